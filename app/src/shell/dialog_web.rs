//! The browser's file dialog: a chosen file becomes one of the page's.

use std::path::Path;

use eframe::egui;

use super::App;
use super::action::Pick;
use crate::web::page;

impl App {
    /// Opens the browser's dialog to choose a chat. Models are in the page, and a chat is saved as a download.
    pub(super) fn pick(&self, ctx: &egui::Context, pick: Pick) {
        if pick != Pick::Open {
            return;
        }
        let (picks, ctx) = (self.picks.0.clone(), ctx.clone());
        js_sys::futures::spawn_local(async move {
            let Ok(Some(file)) = page::pick(".klchat,.json").await else {
                return;
            };
            let path = Path::new("/chosen").join(file.name());
            match page::bytes(&file).await {
                Ok(bytes) => {
                    kimi_linear::files::put(&path, bytes.to_vec());
                    let _ = picks.send((pick, path));
                    ctx.request_repaint();
                }
                Err(error) => tracing::error!("{} cannot be read: {error:?}", file.name()),
            }
        });
    }
}
