//! `kimi-linear quantize`: writes a model as a smaller GGUF.

use std::io::{BufWriter, IntoInnerError, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::Args;
use kimi_linear::checkpoint::gguf::Importance;
use kimi_linear::checkpoint::{ModelFiles, Preset};
use kimi_linear::quantize::{Description, QuantizeOptions, Quantizer};
use kimi_linear::tokenizer::ChatTemplate;
use serde::Serialize;

use super::inspect::Stored;
use super::options::ModelOptions;
use super::progress::Progress;
use super::whole_file;

const AFTER_HELP: &str = "\
Presets, and what they make of the 48B model (98.3 GB in bf16):
  q8        8 bits everywhere                                              52.2 GB
  q5        experts Q4_K and Q5_K, the rest Q6_K                           30.1 GB
  q4        experts Q4_K, the rest Q8_0                                    28.4 GB
  q4-fast   experts Q4_K, the rest Q6_K: fewer bytes per token             28.1 GB
  q4-small  experts IQ4_XS, the rest Q8_0                                  26.9 GB
  q3        experts Q3_K and Q4_K, the rest Q6_K; only with --imatrix      23.9 GB
Routers, norms, biases and convolutions stay in F32.

Examples:
  kimi-linear quantize Kimi-Linear Kimi-Linear-q4.gguf
  kimi-linear quantize Kimi-Linear-BF16.gguf Kimi-Linear-q8.gguf --preset q8
  kimi-linear imatrix Kimi-Linear text.txt -o imatrix.gguf
  kimi-linear quantize Kimi-Linear Kimi-Linear-q3.gguf --preset q3 --imatrix imatrix.gguf
  kimi-linear score --model Kimi-Linear-q4.gguf --against Kimi-Linear -f text.txt    what it costs";

/// Options of `quantize`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Model in BF16, F16 or F32: a folder, a GGUF, or the name of one that `kimi-linear pull` downloaded.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// File to write. A file that exists is not replaced.
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,
    /// Mix of formats: q8, q5, q4, q4-fast, q4-small or q3.
    #[arg(long, value_name = "PRESET", default_value = "q4")]
    preset: Preset,
    /// Importance matrix, from `kimi-linear imatrix` or llama.cpp (GGUF): errors count by how large activations are.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Quantise weights again that are quantised already: their errors add up.
    #[arg(long)]
    allow_requantize: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    preset: &'static str,
    file_bytes: u64,
    stored: Stored,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let out = &arguments.out;
    whole_file::refuse_existing(out)?;
    let model = ModelOptions::at(&arguments.model);
    let files = model.files()?;
    let config = files.config()?;
    let tokenizer = model.tokenizer(&config)?;
    let template = ChatTemplate::source_in(&files)?;
    let importance = match &arguments.imatrix {
        Some(path) => Some(Importance::open(path, &config)?),
        None => None,
    };
    let about = Description {
        name: &model.name(),
        config: &config,
        tokenizer: &tokenizer,
        template: template.as_deref(),
    };
    let options = QuantizeOptions {
        preset: arguments.preset,
        importance: importance.as_ref(),
        requantize: arguments.allow_requantize,
    };
    let quantizer = Quantizer::new(files.checkpoint(&config)?, about, options)?;
    write(&quantizer, out)?;
    let written = ModelFiles::open(out)?;
    let stored = Stored::of(&written, &written.config()?)?;
    let stored = stored.with_context(|| format!("{} has no weights", out.display()))?;
    if arguments.json {
        return super::print_json(&Report {
            path: out.clone(),
            preset: arguments.preset.name(),
            file_bytes: quantizer.bytes(),
            stored,
        });
    }
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{} ({})", out.display(), arguments.preset)?;
    stored.print(&mut stdout)
}

/// Writes the file beside its place and renames it when it is whole. A failure, a full disk or Ctrl-C leaves nothing.
fn write(quantizer: &Quantizer, out: &Path) -> Result<()> {
    let because = || format!("cannot write {}", out.display());
    let dir = whole_file::folder(out);
    let (needed, free) = (quantizer.bytes(), fs4::available_space(dir));
    if let Ok(free) = free
        && free < needed
    {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "{} has {:.1} GB free, and {:.1} GB are needed",
            dir.display(),
            gigabytes(free),
            gigabytes(needed)
        );
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&interrupted);
    ctrlc::set_handler(move || handler.store(true, Ordering::Relaxed))
        .context("cannot listen for Ctrl-C")?;
    let mut file = BufWriter::new(whole_file::temporary(out).with_context(because)?);
    let progress = Progress::bytes("quantising", needed);
    quantizer
        .write(&mut file, &mut |done| {
            progress.set(done);
            match interrupted.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
        .with_context(because)?;
    progress.finish();
    let file = file
        .into_inner()
        .map_err(IntoInnerError::into_error)
        .with_context(because)?;
    whole_file::persist(file, out).with_context(because)
}
