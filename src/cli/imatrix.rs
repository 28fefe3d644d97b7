//! `kimi-linear imatrix`: gathers an importance matrix from a text.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use kimi_linear::checkpoint::gguf::ImportanceSums;
use kimi_linear::engine::EngineSizes;
use kimi_linear::model::Observe;
use kimi_linear::quantize::Gatherer;

use super::counted;
use super::options::{
    DeviceOptions, ModelOptions, WeightOptions, load_model, parse_tokens, read_text,
};
use super::progress::Progress;
use super::whole_file;

const AFTER_HELP: &str = "\
The file is a GGUF as llama.cpp's llama-imatrix writes it: for each matrix, and for each expert of a layer, the sums of the squares of the
activations that its columns are multiplied with. A good text is like what the model will be used for; experts that none of its tokens is
routed to are quantised as if all columns were equally important, so that a hundred thousand tokens are better than ten thousand.

Examples:
  kimi-linear imatrix Kimi-Linear text.txt -o imatrix.gguf
  kimi-linear quantize Kimi-Linear Kimi-Linear-q3.gguf --preset q3 --imatrix imatrix.gguf";

/// Options of `imatrix`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Model: a folder, a GGUF, or the name of one that `kimi-linear pull` downloaded.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Text file; `-` is stdin.
    #[arg(value_name = "TEXT")]
    text: PathBuf,
    /// File to write. A file that exists is not replaced.
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    #[command(flatten)]
    device: DeviceOptions,
    /// Length in tokens of the pieces that the text is cut into: each runs from an empty state.
    #[arg(long, value_name = "N", default_value = "512", value_parser = parse_tokens)]
    chunk: usize,
    /// Maximum number of tokens of the text. Default: all.
    #[arg(long, value_name = "N", value_parser = parse_tokens)]
    max_tokens: Option<usize>,
}

/// Tokens of a step: all activations of a step are in memory.
const STEP: usize = 128;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let output = &arguments.output;
    whole_file::refuse_existing(output)?;
    let model = ModelOptions::at(&arguments.model);
    let files = model.files()?;
    let config = files.config()?;
    let text = read_text(&arguments.text)?;
    let mut tokens = model.tokenizer(&config)?.encode_ordinary(&text)?;
    tokens.truncate(arguments.max_tokens.unwrap_or(usize::MAX));
    if tokens.is_empty() {
        bail!("{} has no text", arguments.text.display());
    }
    let chunk = arguments
        .chunk
        .min(config.model_max_length)
        .min(tokens.len());
    let sizes = EngineSizes {
        prefill_chunk: chunk.min(STEP),
        checkpoints: 0,
        ..EngineSizes::one(chunk)
    };
    let checkpoint = files.checkpoint(&config)?;
    let backend = arguments.device.open()?;
    let mut loaded = load_model(
        &model,
        WeightOptions::default(),
        &config,
        backend,
        |device| sizes.limits(device.cache),
    )?;
    let mut observer = loaded.model.observer(Observe::Inputs)?;
    let mut gatherer = Gatherer::new(&checkpoint, config.num_experts);
    let progress = Progress::tokens("gathering", tokens.len());
    let mut done = 0;
    for chunk in tokens.chunks(chunk) {
        observer.run(chunk, &mut |observed| {
            done += observed.tokens.len();
            progress.set(done as u64);
            gatherer.add(observed)
        })?;
    }
    progress.finish();
    let weights = gatherer.finish();
    let counts = weights.values().flat_map(|sums| &sums.counts);
    // An expert has three matrices.
    let unseen = counts.filter(|count| **count == 0.0).count() / 3;
    let sums = ImportanceSums {
        dataset: name_of(&arguments.text),
        chunks: u32::try_from(tokens.len().div_ceil(chunk)).unwrap_or(u32::MAX),
        chunk_tokens: u32::try_from(chunk).unwrap_or(u32::MAX),
        weights,
    };
    let because = || format!("cannot write {}", output.display());
    let mut file = whole_file::temporary(output).with_context(because)?;
    file.write_all(&sums.to_gguf()).with_context(because)?;
    whole_file::persist(file, output).with_context(because)?;
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "{}: {} matrices or stacks of experts, {}",
        output.display(),
        sums.weights.len(),
        counted(tokens.len(), "token")
    )?;
    if unseen > 0 {
        writeln!(
            stdout,
            "no token was routed to {}",
            counted(unseen, "expert")
        )?;
    }
    Ok(())
}

fn name_of(text: &Path) -> String {
    let name = text.file_name().unwrap_or(text.as_os_str());
    name.to_string_lossy().into_owned()
}
