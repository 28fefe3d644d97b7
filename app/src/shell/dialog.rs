//! The system's file dialog. In a browser it is `dialog_web`.

use eframe::egui;

use super::App;
use super::action::Pick;

impl App {
    /// Opens the system's file dialog in a thread of its own; on systems without one, paths can be typed.
    pub(super) fn pick(&self, ctx: &egui::Context, pick: Pick) {
        let dialog = rfd::AsyncFileDialog::new();
        let suggested = self.file_name();
        let name = suggested
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (picks, ctx) = (self.picks.0.clone(), ctx.clone());
        let chosen: std::pin::Pin<Box<dyn Future<Output = Option<rfd::FileHandle>> + Send>> =
            match pick {
                Pick::Folder => Box::pin(dialog.set_title("The model's folder").pick_folder()),
                Pick::Gguf => Box::pin(
                    dialog
                        .set_title("A GGUF file")
                        .add_filter("GGUF", &["gguf"])
                        .pick_file(),
                ),
                Pick::Open => Box::pin(dialog.set_title("Open a chat").pick_file()),
                Pick::Save => Box::pin(
                    dialog
                        .set_title("Save this chat")
                        .set_file_name(name)
                        .save_file(),
                ),
            };
        let waited = std::thread::Builder::new().name("dialog".to_owned()).spawn(move || {
            if let Some(file) = pollster::block_on(chosen) {
                let _ = picks.send((pick, file.path().to_owned()));
                ctx.request_repaint();
            } else {
                tracing::info!("no file was chosen; where the system has no dialog, a path can be typed instead");
            }
        });
        if let Err(error) = waited {
            tracing::error!("the system gives no thread: {error}");
        }
    }
}
