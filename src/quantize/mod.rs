//! Writes a model as a GGUF in the formats of a [`Preset`]: tensors one after the other, each quantised when it is its turn.
//!
//! The file is one that llama.cpp's converter and quantiser could have made: the same names, shapes and keys, with tokenizer and chat
//! template. `layout` says how tensors are laid, `metadata` what the keys say. It opens no files.

mod gather;
mod layout;
mod metadata;

use std::io::Write;
use std::ops::ControlFlow;

pub use self::gather::Gatherer;
use self::layout::Planned;
use crate::checkpoint::gguf::Importance;
use crate::checkpoint::gguf::write::{self, Placed};
use crate::checkpoint::{Checkpoint, Preset};
use crate::config::ModelConfig;
use crate::error::{Error, QuantizeError};
use crate::tokenizer::Tokenizer;

/// What a model is quantised to.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions<'a> {
    /// The mix of formats.
    pub preset: Preset,
    /// The importance of columns.
    pub importance: Option<&'a Importance>,
    /// Whether weights that are in blocks already are quantised again.
    pub requantize: bool,
}

/// What a file says about its model besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// The model's name.
    pub name: &'a str,
    /// The configuration.
    pub config: &'a ModelConfig,
    /// The tokenizer, fitted to the embedding.
    pub tokenizer: &'a Tokenizer,
    /// The source of the chat template.
    pub template: Option<&'a str>,
}

/// A model and the file that it is to become.
pub struct Quantizer {
    checkpoint: Checkpoint,
    config: ModelConfig,
    tensors: Vec<Planned>,
    header: Vec<u8>,
}

/// The same weights, each quantised when it is loaded.
///
/// # Errors
/// Weights that are quantised already, and a preset that needs an importance matrix.
pub fn while_loading(
    checkpoint: Checkpoint,
    config: &ModelConfig,
    preset: Preset,
) -> Result<Checkpoint, Error> {
    refuse_quantized(&checkpoint)?;
    refuse_without_importance(preset, None)?;
    Ok(checkpoint.quantized(config, preset, None)?)
}

fn refuse_without_importance(
    preset: Preset,
    importance: Option<&Importance>,
) -> Result<(), QuantizeError> {
    match preset.needs_importance() && importance.is_none() {
        true => Err(QuantizeError::NoImportance {
            preset: preset.to_string(),
        }),
        false => Ok(()),
    }
}

/// Refuses weights that are quantised already: a second error would be added to theirs.
fn refuse_quantized(checkpoint: &Checkpoint) -> Result<(), QuantizeError> {
    match checkpoint.first_quantized() {
        None => Ok(()),
        Some((tensor, format)) => Err(QuantizeError::Already {
            tensor: tensor.to_owned(),
            format: format.to_string(),
        }),
    }
}

impl Quantizer {
    /// Plans the file. No weight is read.
    ///
    /// # Errors
    /// Weights that are quantised already, a preset without the importance that it needs, a model or a tokenizer that a GGUF cannot
    /// hold.
    pub fn new(
        checkpoint: Checkpoint,
        about: Description<'_>,
        options: QuantizeOptions<'_>,
    ) -> Result<Self, Error> {
        let QuantizeOptions {
            preset,
            importance,
            requantize,
        } = options;
        if !requantize {
            refuse_quantized(&checkpoint)?;
        }
        refuse_without_importance(preset, importance)?;
        let config = ModelConfig {
            tie_word_embeddings: false,
            ..about.config.clone()
        };
        let checkpoint = checkpoint.quantized(about.config, preset, importance)?;
        let tensors = layout::plan(&config, &checkpoint, preset)?;
        let mut keys = metadata::keys(&about, preset)?;
        keys.extend(importance.map(Importance::keys).unwrap_or_default());
        let placed: Vec<Placed> = tensors.iter().map(|tensor| tensor.placed.clone()).collect();
        Ok(Self {
            header: write::header(&keys, &placed),
            checkpoint,
            config,
            tensors,
        })
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = self.tensors.iter().map(|tensor| tensor.placed.bytes);
        let padded = bytes.map(|bytes| bytes + write::padding(bytes));
        self.header.len() as u64 + padded.sum::<u64>()
    }

    /// Writes the file. `progress` receives the number of bytes so far, and stops it by breaking.
    ///
    /// # Errors
    /// [`QuantizeError::Write`], [`QuantizeError::Stopped`], files of the model that cannot be read any more, and weights that are not
    /// finite or too large for a format.
    pub fn write(
        &self,
        out: &mut dyn Write,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut done = 0;
        let mut put = |bytes: &[u8]| -> Result<(), Error> {
            out.write_all(bytes).map_err(QuantizeError::Write)?;
            done += bytes.len() as u64;
            match progress(done) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(QuantizeError::Stopped.into()),
            }
        };
        put(&self.header)?;
        for tensor in &self.tensors {
            for name in &tensor.names {
                put(&tensor.bytes_of(&self.checkpoint.tensor(name)?, &self.config)?)?;
            }
            let padding = write::padding(tensor.placed.bytes) as usize;
            put(&[0; 64][..padding.min(64)])?;
        }
        out.flush().map_err(QuantizeError::Write)?;
        Ok(())
    }
}
