//! `--connect` against a server of our own in this process, which serves the demo model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{harness, start, until, wake};
use eframe::egui;
use egui_kittest::Harness;
use egui_kittest::kittest::Queryable;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{Engine, EngineHandle, EngineOptions, EngineSizes};
use kimi_linear::model::Model;
use kimi_linear::server::{Parts, Server, ServerOptions};
use kimi_linear::tokenizer::{ChatTemplate, Tokenizer};
use kimi_linear_app::session::remote;
use kimi_linear_app::settings::Settings;
use kimi_linear_app::shell::App;
use kimi_linear_app::shell::action::Action;

/// What `kimi-linear serve` makes of the demo model.
fn parts() -> Parts {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"));
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_dir(&dir).unwrap());
    let limits = EngineSizes::one(2048).limits(Dtype::F32);
    let backend = Box::new(CpuBackend::new());
    let model = Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap();
    let engine = Engine::new(model, EngineOptions::default());
    Parts {
        context: engine.context(),
        engine: EngineHandle::start(engine).unwrap(),
        tokenizer,
        template: Some(ChatTemplate::from_dir(&dir).unwrap()),
        config,
        transfers: None,
    }
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
    server.opener().open(parts()).unwrap();
    let url = format!("http://{}/v1", server.address());
    runtime.spawn(server.run(std::future::pending()));
    (runtime, url)
}

fn act(harness: &mut Harness<'_, App>, action: Action) {
    let ctx: egui::Context = harness.ctx.clone();
    harness.state_mut().act(&ctx, action);
    harness.step();
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
    assert!(problem.is_some(), "a server that is gone is told of");
}
