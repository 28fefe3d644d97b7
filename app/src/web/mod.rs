//! The app in a browser's tab.

pub mod conformance;
pub mod page;

use std::sync::Arc;

use eframe::{WebOptions, WebRunner};
use wasm_bindgen::JsCast;

use crate::kept::Keeper;
use crate::log::Log;
use crate::session::{Wake, local};
use crate::settings::Settings;
use crate::shell::{ARRANGEMENT, App, SETTINGS, Start};

/// Starts what the address asks for: the app, or with `?conformance` nothing, since the page then calls
/// [`conformance::conformance`].
pub fn main() {
    if page::query() == "?conformance" {
        return;
    }
    js_sys::futures::spawn_local(async {
        if let Err(reason) = show().await {
            page::refuse(&format!("The app cannot be shown here: {reason}."));
        }
    });
}

async fn show() -> Result<(), String> {
    let document = web_sys::window().and_then(|window| window.document());
    let canvas = document.and_then(|document| document.get_element_by_id("app"));
    let canvas = canvas.and_then(|element| element.dyn_into().ok());
    let canvas = canvas.ok_or("the page has no canvas")?;
    let started = WebRunner::new()
        .start(
            canvas,
            WebOptions::default(),
            Box::new(|creation| Ok(Box::new(app(creation)?))),
        )
        .await;
    started.map_err(|error| format!("{error:?}"))?;
    page::begin();
    Ok(())
}

fn app(creation: &eframe::CreationContext<'_>) -> std::io::Result<App> {
    let log = Log::default();
    log.follow();
    let ctx = creation.egui_ctx.clone();
    let wake: Wake = Arc::new(move || ctx.request_repaint());
    let storage = creation.storage;
    let mut app = App::new(Start {
        session: local::start(wake)?,
        settings: storage
            .and_then(|storage| eframe::get_value::<Settings>(storage, SETTINGS))
            .unwrap_or_default(),
        arrangement: storage.and_then(|storage| eframe::get_value(storage, ARRANGEMENT)),
        log,
        folder: None,
        keeper: Some(Keeper::start()),
        script: None,
        kept: true,
    });
    app.open_link(&page::fragment());
    Ok(app)
}
