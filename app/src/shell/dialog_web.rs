//! The browser's file dialog: chosen files become those of the page.

use std::path::{Path, PathBuf};

use eframe::egui;
use wasm_bindgen::JsCast;

use super::App;
use super::action::Pick;
use crate::web::{address, page};

impl App {
    /// Opens the browser's dialog. A chat is saved as a download.
    pub(super) fn pick(&self, ctx: &egui::Context, pick: Pick) {
        let (kinds, what) = match pick {
            Pick::Folder => ("", "folder"),
            Pick::Gguf => (".gguf", "files"),
            Pick::Open => (".klchat,.json", "file"),
            Pick::Save => return,
        };
        let (picks, ctx) = (self.picks.0.clone(), ctx.clone());
        js_sys::futures::spawn_local(async move {
            let Ok(chosen) = page::pick(kinds, what).await else {
                return;
            };
            let chosen = chosen.iter().filter_map(|file| file.dyn_into().ok());
            if let Some(path) = put(pick, chosen.collect()).await {
                let _ = picks.send((pick, path));
                ctx.request_repaint();
            }
        });
    }
}

/// Puts chosen files where they can be read; the path of the chat or of the model.
async fn put(pick: Pick, mut chosen: Vec<web_sys::File>) -> Option<PathBuf> {
    chosen.sort_by_key(web_sys::File::name);
    let first = chosen.first()?;
    if pick == Pick::Open {
        let path = Path::new("/chat").join(first.name());
        match page::bytes(first).await {
            Ok(bytes) => kimi_linear::files::put(&path, bytes.to_vec()),
            Err(error) => {
                tracing::error!("{} cannot be read: {error:?}", first.name());
                return None;
            }
        }
        return Some(path);
    }
    let folder = address::put(&chosen, &page::folder(first));
    Some(match pick {
        Pick::Gguf => folder.join(first.name()),
        _ => folder,
    })
}
