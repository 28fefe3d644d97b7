//! What a path leads to: a folder in the published form, or a GGUF, which has everything in one file.

use std::path::{Path, PathBuf};

use super::Checkpoint;
use super::gguf::{Gguf, MetadataOverride};
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Error};

/// The files of a model: where its configuration and its weights, tokenizer and chat template come from.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A folder with `config.json`, safetensors weights and the tokenizer's files.
    Folder(PathBuf),
    /// A GGUF, of one file or several.
    Gguf(Box<Gguf>),
}

impl ModelFiles {
    /// Looks at what is there. A GGUF is named by its file, by any part of a split one, or by a folder that holds one model
    /// in GGUF and no weights in safetensors; anything else counts as a folder in the published form. Only a GGUF's header
    /// is read.
    ///
    /// # Errors
    /// A GGUF that cannot be opened, is damaged, or is of another model.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if Gguf::is_at(path) {
            return Ok(Self::Gguf(Box::new(Gguf::open(path)?)));
        }
        Ok(Self::Folder(path.to_owned()))
    }

    /// Reads these values in place of a GGUF's metadata.
    ///
    /// # Errors
    /// A folder in the published form, which has no metadata.
    pub fn overridden(mut self, overrides: &[MetadataOverride]) -> Result<Self, CheckpointError> {
        match (&mut self, overrides.first()) {
            (Self::Gguf(gguf), _) => gguf.overrule(overrides),
            (Self::Folder(_), None) => {}
            (Self::Folder(dir), Some(first)) => {
                return Err(CheckpointError::Override {
                    given: first.key().to_owned(),
                    expected: "a GGUF, whose metadata is overridden".to_owned(),
                    found: format!("{}; change its config.json", dir.display()),
                });
            }
        }
        Ok(self)
    }

    /// The path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(dir) => dir,
            Self::Gguf(gguf) => gguf.path(),
        }
    }

    /// The configuration: of `config.json` (which the path may name itself), or of the GGUF's metadata.
    ///
    /// # Errors
    /// A configuration that cannot be read, or is not that of this model.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        match self {
            Self::Folder(file) if file.is_file() => Ok(ModelConfig::from_file(file)?),
            Self::Folder(dir) => Ok(ModelConfig::from_file(&dir.join("config.json"))?),
            Self::Gguf(gguf) => gguf.config(),
        }
    }

    /// Maps the weights and checks them against `config`.
    ///
    /// # Errors
    /// As for [`Checkpoint::open`].
    pub fn checkpoint(&self, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        match self {
            Self::Folder(dir) => Checkpoint::of_folder(dir, config),
            Self::Gguf(gguf) => gguf.checkpoint(config),
        }
    }
}
