//! The files of a model at a path: a folder in the published format, or a GGUF, which has everything in one file.

use std::path::{Path, PathBuf};

use super::Checkpoint;
use super::gguf::{Gguf, MetadataOverride};
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Error};
use crate::files;

/// The files of a model: the source of its configuration, weights, tokenizer and chat template.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A folder with `config.json`, safetensors weights and the tokenizer's files.
    Folder(PathBuf),
    /// A GGUF, of one file or several.
    Gguf(Box<Gguf>),
}

impl ModelFiles {
    /// Detects the files at a path. A GGUF is given by its file, by any part of a split one, or by a folder with one model in
    /// GGUF and no safetensors weights; anything else is taken as a folder in the published format. Only a GGUF's header is
    /// read.
    ///
    /// # Errors
    /// A GGUF that cannot be opened, is damaged, or is of another model.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if Gguf::is_at(path) {
            return Ok(Self::Gguf(Box::new(Gguf::open(path)?)));
        }
        Ok(Self::Folder(path.to_owned()))
    }

    /// Overrides values of a GGUF's metadata.
    ///
    /// # Errors
    /// A folder in the published format, which has no metadata.
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

    /// The configuration: from `config.json` (which may be the path itself), or from the GGUF's metadata.
    ///
    /// # Errors
    /// A configuration that cannot be read, or is for another model.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        match self {
            Self::Folder(file) if files::is_file(file) => Ok(ModelConfig::from_file(file)?),
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
