//! The app in a browser's tab.

pub mod address;
pub mod conformance;
pub mod page;

use std::sync::Arc;
use std::time::Duration;

use eframe::{WebOptions, WebRunner};
use wasm_bindgen::JsCast;

use crate::kept::Keeper;
use crate::log::Log;
use crate::session::{Wake, local};
use crate::settings::Settings;
use crate::shell::{ARRANGEMENT, App, SETTINGS, Start};
use crate::theme;

/// Interval at which new text is drawn.
const SPACING: Duration = Duration::from_millis(33);
/// The same where drawing takes the time of the CPU that the model needs.
const SOFTWARE_SPACING: Duration = Duration::from_secs(1);

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
    let software = page::software()
        .await
        .is_ok_and(|software| software.is_truthy());
    let options = WebOptions {
        // egui draws twice or more for what is new; what the user does is drawn at once all the same.
        max_fps: software.then_some(1),
        ..WebOptions::default()
    };
    let started = WebRunner::new()
        .start(
            canvas,
            options,
            Box::new(move |creation| Ok(Box::new(app(creation, software)?))),
        )
        .await;
    started.map_err(|error| format!("{error:?}"))?;
    page::begin();
    Ok(())
}

fn app(creation: &eframe::CreationContext<'_>, software: bool) -> std::io::Result<App> {
    let log = Log::default();
    log.follow();
    let ctx = creation.egui_ctx.clone();
    if software {
        theme::keep_still(&ctx);
    }
    let spacing = if software { SOFTWARE_SPACING } else { SPACING };
    let wake: Wake = Arc::new(move || ctx.request_repaint_after(spacing));
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
