//! `kimi-linear pull`: downloads a model from the hub.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use indicatif::DecimalBytes;
use kimi_linear_hub::{Event, ModelName, Pulled, Settings};
use serde::Serialize;

use super::counted;
use super::progress::Progress;

const AFTER_HELP: &str = "\
Examples:
  kimi-linear pull moonshotai/Kimi-Linear-48B-A3B-Instruct   the checkpoint in bf16, 98 GB
  kimi-linear pull someone/Kimi-Linear-GGUF:Q4_K_M           one of several GGUF files
  kimi-linear chat --model someone/Kimi-Linear-GGUF:Q4_K_M   use it
  HF_HOME=/mnt/models kimi-linear pull ORG/NAME              keep it on another disk

The variables are those of Python's huggingface_hub: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN (or its token file), HF_HUB_OFFLINE. SSL_CERT_FILE names certificates to trust
instead of the built-in ones. HTTPS_PROXY, HTTP_PROXY and NO_PROXY are read too.
The path of the model is printed on stdout.";

/// Options of `pull`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Model. QUANT is a quantisation of a repository of GGUF files, such as Q4_K_M (the default, if there are several), or the path of a file there.
    #[arg(value_name = "ORG/NAME[:QUANT]")]
    model: ModelName,
    /// Branch, tag or commit. --model ORG/NAME is always the last pulled commit of main; other revisions are used by their path.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Hub to download from. Default: HF_ENDPOINT, or https://huggingface.co.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Number of files to download at the same time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = RangedU64ValueParser::<usize>::new().range(1..=16))]
    jobs: usize,
    /// Print one JSON object instead of the path.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    commit: Option<String>,
    files: usize,
    bytes: u64,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let mut settings = Settings::from_environment()?;
    if let Some(endpoint) = &arguments.endpoint {
        settings = settings.at(endpoint)?;
    }
    settings.jobs = arguments.jobs;
    let name = &arguments.model;
    ctrlc::set_handler(|| {
        let _ = writeln!(
            std::io::stderr(),
            "\ninterrupted; the same command goes on from here"
        );
        // What was written stays, and locks end with the process.
        std::process::exit(130);
    })
    .context("cannot listen for Ctrl-C")?;
    let display = Display::default();
    let revision = arguments.revision.as_deref();
    let pulled = kimi_linear_hub::pull(&settings, name, revision, &|event| display.show(event));
    display.finish();
    let Pulled {
        path,
        commit,
        files,
        bytes,
    } = pulled?;
    if arguments.json {
        return super::print_json(&Report {
            path,
            commit,
            files,
            bytes,
        });
    }
    let model = match revision {
        None => name.to_string(),
        Some(_) => path.display().to_string(),
    };
    writeln!(
        std::io::stderr(),
        "ready, for example: kimi-linear chat --model {model}"
    )?;
    writeln!(std::io::stdout(), "{}", path.display())?;
    Ok(())
}

/// A bar for all files together, and lines beside it.
#[derive(Default)]
struct Display {
    bar: OnceLock<Progress>,
    done: AtomicI64,
}

impl Display {
    fn show(&self, event: Event<'_>) {
        match event {
            Event::Bytes(count) => {
                let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
                if let Some(bar) = self.bar.get() {
                    bar.set(done.max(0) as u64);
                }
            }
            Event::Chosen { bytes, .. } => {
                print_event(event);
                self.bar
                    .get_or_init(|| Progress::transfer("pulling", bytes));
            }
            _ => match self.bar.get() {
                Some(bar) => bar.beside(|| print_event(event)),
                None => print_event(event),
            },
        }
    }

    fn finish(&self) {
        self.bar.get().into_iter().for_each(Progress::finish);
    }
}

/// Prints what a user may want to know.
pub(crate) fn print_event(event: Event<'_>) {
    let text = match event {
        Event::Bytes(_) => return,
        Event::Chosen {
            files,
            bytes,
            quantisation,
            others,
        } => {
            let mut text = format!("{}, {}", counted(files, "file"), DecimalBytes(bytes));
            if let Some(quantisation) = quantisation {
                text = format!("{quantisation}: {text}");
            }
            let others: Vec<String> = others
                .iter()
                .map(|other| format!("{} ({})", other.label, DecimalBytes(other.bytes)))
                .collect();
            if !others.is_empty() {
                text = format!("{text}; not pulled: {}", others.join(", "));
            }
            text
        }
        Event::Done { path, bytes } => format!("{path}  {}", DecimalBytes(bytes)),
        Event::Waiting { path } => format!("{path}: another process downloads it; waiting"),
        Event::Again { url, why, wait } => {
            format!("{url}: {why}; again in {:.1} s", wait.as_secs_f64())
        }
        Event::Restarted { path, why } => format!("{path}: {why}; from the beginning again"),
    };
    let _ = writeln!(std::io::stderr(), "{text}");
}
