//! What can be known of a model before it is loaded: whether it can chat, and whether it fits.

use std::path::PathBuf;

use kimi_linear::backend::Backend;
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::config::ModelConfig;
use kimi_linear::error::Error;
use kimi_linear::files::{Held, reading};
use kimi_linear::llm::LlmFiles;

use super::host::{self, Open};
use super::{Estimate, LoadRequest, Teller, Update, aside};
use crate::facts::{Fit, bytes, memory};
use crate::problem::{Problem, WayOut};

/// Opens the files and the device of a model, and checks that it can chat and that it fits. What was read of the files is kept
/// until it is loaded.
///
/// # Errors
/// Files that are missing or damaged, a model without a chat template, a device that cannot be opened or is too small.
pub(super) async fn checked(
    open: &Open,
    request: &LoadRequest,
) -> Result<(LlmFiles, Box<dyn Backend>, [Held; 2]), Problem> {
    let folder = &request.folder;
    host::forget(folder);
    host::serve(folder);
    let check = async || -> Result<_, Error> {
        let (files, opened) = reading(|| LlmFiles::open(folder)).await?;
        // The app can only chat with a model.
        files.template()?;
        let (checkpoint, read) = reading(|| files.files.checkpoint(&files.config)).await?;
        let backend = host::open(open, request.backend, request.device).await?;
        Ok((files, checkpoint.total_bytes(), backend, [opened, read]))
    };
    let checked = check().await.map_err(|error| Problem::of_loading(&error));
    let (files, weights, backend, held) = checked?;
    let device = backend.device();
    let needed = memory(&files.config, device, request.context, Some(weights));
    if Fit::of(&needed, device) == Fit::TooLarge {
        let sentence = format!(
            "{} needs {} on {}, which has {}. Choose another device or a shorter context.",
            request.name,
            bytes(needed.total()),
            device.name,
            bytes(device.memory_bytes.unwrap_or_default())
        );
        return Err(Problem::new(sentence, WayOut::ChooseDevice));
    }
    Ok((files, backend, held))
}

/// Reads a configuration and asks every driver for its devices, which may be slow.
pub(super) fn estimate(teller: &Teller, folder: PathBuf, context: usize) {
    let teller = teller.clone();
    aside("estimate", move || async move {
        host::serve(&folder);
        let read = || -> Result<(ModelConfig, Option<u64>), Error> {
            let files = ModelFiles::open(&folder)?;
            let config = files.config()?;
            let stored = files.contents(&config)?;
            let bytes = stored.map(|formats| formats.iter().map(|format| format.bytes).sum());
            Ok((config, bytes))
        };
        let result = match reading(read).await {
            Ok(((config, stored), _)) => Ok(Estimate {
                parameters: config.parameters(),
                active: config.active_parameters(),
                longest: config.model_max_length,
                devices: host::devices()
                    .await
                    .into_iter()
                    .map(|device| {
                        let memory = memory(&config, &device, context, stored);
                        (device, memory)
                    })
                    .collect(),
            }),
            Err(error) => {
                host::forget(&folder);
                Err(Problem::of_loading(&error))
            }
        };
        teller.tell(Update::Estimate { folder, result });
    });
}
