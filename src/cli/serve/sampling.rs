//! Sampling defaults: vLLM's `--generation-config` and `--override-generation-config`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::server::SamplingDefaults;

/// Where sampling defaults come from.
#[derive(Args)]
#[command(next_help_heading = "Sampling defaults")]
pub(super) struct Sampling {
    /// Where the sampling defaults come from, and further ids that end an answer: `auto` is generation_config.json in the model's
    /// folder, `vllm` OpenAI's defaults without any file, anything else another folder with a generation_config.json. Temperature,
    /// top_p, top_k, min_p and repetition_penalty are for requests that do not set them; max_new_tokens limits every answer.
    #[arg(long, value_name = "auto|vllm|DIR", default_value = "auto")]
    generation_config: PathBuf,
    /// Sampling defaults as a JSON object; they replace those of --generation-config.
    #[arg(long, value_name = "JSON")]
    override_generation_config: Option<String>,
}

impl Sampling {
    /// The defaults for a model, with a line in the log that says which there are.
    pub(super) fn defaults(&self, files: &ModelFiles) -> Result<SamplingDefaults> {
        let from = self.generation_config.as_path();
        let (file, defaults) = of_file(from, files)?;
        if let (Some(file), Some(set)) = (file, defaults.summary()) {
            tracing::info!(
                "sampling defaults from generation_config.json in {}: {set}; --generation-config vllm ignores them",
                file.display()
            );
        }
        let Some(json) = &self.override_generation_config else {
            return Ok(defaults);
        };
        let defaults = defaults.overridden("--override-generation-config", json)?;
        if let Some(set) = defaults.summary() {
            tracing::info!("sampling defaults with --override-generation-config: {set}");
        }
        Ok(defaults)
    }
}

/// The defaults of a file, and the folder that it is in.
fn of_file<'a>(
    from: &'a Path,
    files: &'a ModelFiles,
) -> Result<(Option<&'a Path>, SamplingDefaults)> {
    if from == Path::new("vllm") {
        return Ok((None, SamplingDefaults::default()));
    }
    if from == Path::new("auto") {
        // A GGUF has no such file.
        let ModelFiles::Folder(folder) = files else {
            return Ok((None, SamplingDefaults::default()));
        };
        let found = SamplingDefaults::from_folder(folder)?.unwrap_or_default();
        return Ok((Some(folder), found));
    }
    ensure!(
        from.is_dir(),
        "--generation-config {}: there is no such folder; give `auto`, `vllm` or a folder with a generation_config.json",
        from.display()
    );
    let found = SamplingDefaults::required_in(from).context("--generation-config")?;
    Ok((Some(from), found))
}
