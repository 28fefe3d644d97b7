//! `--connect` against a server of our own in this process, which serves the demo model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;

use common::{act, harness, start, until, wake};
use egui_kittest::kittest::Queryable;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::server::{Server, ServerOptions};
use kimi_linear_app::session::remote;
use kimi_linear_app::settings::Settings;
use kimi_linear_app::shell::action::Action;

/// The demo model, as `kimi-linear serve` loads it.
fn demo() -> Llm {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"));
    let files = LlmFiles::open(dir).unwrap();
    let backend = Box::new(CpuBackend::new());
    let options = LlmOptions::one(2048);
    let load = files.load(backend, &options, &mut |_, _| ControlFlow::Continue(()));
    load.unwrap()
}

/// A server that answers until the runtime goes.
fn serve() -> (tokio::runtime::Runtime, String) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let bound = Server::bind(("127.0.0.1", 0), ServerOptions::new("demo"));
    let server = runtime.block_on(bound).unwrap();
    server.opener().open(demo().into(), None).unwrap();
    let url = format!("{}/v1", server.url());
    runtime.spawn(server.run(std::future::pending()));
    (runtime, url)
}

#[test]
fn a_server_answers_stops_and_is_missed_when_it_goes() {
    let (runtime, url) = serve();
    let session = remote::start(&url, wake()).unwrap();
    let mut harness = harness(start(session, Settings::default()), 1000.0, 700.0);
    until(&mut harness, "the server", |app| app.ready().is_ok());
    harness.get_by_label("demo on a server");
    let question = "The red box holds 7. Now the red box holds 3. What does the red box hold?";
    act(&mut harness, Action::Ask(question.to_owned()));
    until(&mut harness, "the answer", |app| !app.chat().busy());
    let chat = harness.state().chat();
    let turn = &chat.turns[0];
    assert!(turn.problem.is_none(), "{:?}", turn.problem);
    assert!(turn.answer.contains('3'), "{}", turn.answer);
    assert!(turn.footer.as_ref().unwrap().contains("tokens"));
    assert!(chat.measures.context_used > 20, "the server's own count");
    assert!(chat.history.traced().is_empty(), "its memory stays with it");

    // The conversation goes along with the next question.
    act(
        &mut harness,
        Action::Ask("What does the red box hold?".to_owned()),
    );
    until(&mut harness, "the second answer", |app| !app.chat().busy());
    assert_eq!(harness.state().chat().conversation.turns(), 2);

    act(&mut harness, Action::Ask(question.to_owned()));
    act(&mut harness, Action::Stop);
    until(&mut harness, "the end", |app| !app.chat().busy());

    runtime.shutdown_background();
    act(&mut harness, Action::NewChat);
    act(&mut harness, Action::Ask(question.to_owned()));
    until(&mut harness, "the refusal", |app| !app.chat().busy());
    let problem = harness.state().chat().turns[0].problem.clone();
    assert!(problem.is_some(), "a server that is gone is reported");
}
