//! The command line: one file per subcommand, each a small client of the library.
//!
//! Results go to stdout, all else to stderr; `--json` prints one JSON object and nothing else. Errors are one line and
//! exit with 1; a command line that cannot be parsed exits with 2, as clap does.

mod bench;
mod chat;
mod conformance;
mod data_parallel;
mod devices;
mod eval;
mod generate;
mod imatrix;
mod inspect;
mod log;
mod manual;
mod model_path;
mod nodes;
mod offload;
mod options;
mod parallel;
mod plan;
mod progress;
mod pull;
mod quantize;
mod score;
#[cfg(feature = "server")]
mod serve;
mod speculative;
mod tokenize;
mod verify;
mod whole_file;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::sync::Arc;

#[cfg(feature = "server")]
use clap::CommandFactory;
use clap::{Parser, Subcommand};

use self::log::Log;

const AFTER_HELP: &str = "\
Examples:
  kimi-linear run \"Hello\"                        one answer of the built-in demo model
  kimi-linear inspect ORG/NAME:Q4_K_M            will a model of the Hugging Face hub fit on this machine?
  kimi-linear pull ORG/NAME:Q4_K_M               download it
  kimi-linear chat --model ORG/NAME:Q4_K_M       a chat with it, or with a model in a folder or a GGUF file
  kimi-linear serve --model Kimi-Linear          an OpenAI-compatible server on port 8000

Numbers of tokens may have a unit: 128K and 1M count by 1,024, 128k and 1m by 1,000, as in vLLM.
Results go to stdout, messages to stderr. Exit status: 0 success, 2 a command line that cannot be parsed, 1 any other error.
KIMI_LINEAR_LOG=error, warn, info or debug sets the log level (default: info for serve, otherwise warn). NO_COLOR=1 turns colours off.";

#[derive(Parser)]
#[command(
    name = "kimi-linear",
    version,
    about = "Run Kimi Linear, the hybrid linear-attention language model",
    after_help = AFTER_HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one message, or a chat from a JSON file, with the chat template.
    #[command(mut_arg("chat", |chat| chat.hide(true)))]
    #[command(
        after_help = "Examples:\n  kimi-linear run \"The red box holds 7. What does the red box hold?\"\n  kimi-linear run --model Kimi-Linear --system \"Answer in one sentence.\" \"What is a delta rule?\""
    )]
    Run(generate::Arguments),
    /// Chat with a model in the terminal.
    #[command(
        after_help = "Examples:\n  kimi-linear chat\n  kimi-linear chat --model Kimi-Linear-Q4_K_M.gguf --context 128K --temp 0.6"
    )]
    Chat(chat::Arguments),
    /// Continue a text; with --chat or --messages, answer as `run` does.
    #[command(
        after_help = "Examples:\n  kimi-linear generate --model Kimi-Linear \"Once upon a time\" -n 100\n  kimi-linear generate --model Kimi-Linear --messages chat.json --temp 1.0 --top-p 0.95 --seed 7"
    )]
    Generate(generate::Arguments),
    /// Start an OpenAI-compatible HTTP server.
    #[cfg(feature = "server")]
    Serve(Box<serve::Arguments>),
    /// Download a model from the Hugging Face hub.
    ///
    /// It goes to the cache of Python's huggingface_hub. Only the files that this program reads are downloaded: of a repository of GGUF files
    /// those of one quantisation. The hash of every file is checked. A pull that was interrupted goes on where it stopped when the same command
    /// runs again.
    Pull(pull::Arguments),
    /// Print a model's layers, parameters, weight formats and memory use; reads headers, not weights.
    #[command(
        after_help = "Examples:\n  kimi-linear inspect someone/Kimi-Linear-GGUF:Q4_K_M     before a download: will it fit?\n  kimi-linear inspect --model Kimi-Linear --context 1M\n  kimi-linear inspect --shape 48b"
    )]
    Inspect(inspect::Arguments),
    /// List the backends and devices of this machine.
    Devices(devices::Arguments),
    /// Print the token ids of a text or a chat.
    #[command(
        after_help = "Examples:\n  kimi-linear tokenize --model Kimi-Linear \"Hello, world\"\n  kimi-linear tokenize --model Kimi-Linear --messages chat.json --json"
    )]
    Tokenize(tokenize::Arguments),
    /// Compute negative log-likelihood and perplexity of a text, and optionally write its logits.
    #[command(
        after_help = "Examples:\n  kimi-linear score --model Kimi-Linear -f text.txt\n  kimi-linear score --model Kimi-Linear -f text.txt --logits logits.safetensors\n  kimi-linear score --model Kimi-Linear-q4.gguf -f text.txt --against Kimi-Linear     what quantisation costs"
    )]
    Score(score::Arguments),
    /// Ask questions with known answers and print the exact-match accuracy per task.
    #[command(
        after_help = "Examples:\n  kimi-linear eval --show-wrong 2\n  kimi-linear eval --model Kimi-Linear --data questions.jsonl --all"
    )]
    Eval(eval::Arguments),
    /// Write a model as a smaller GGUF, for this program and llama.cpp.
    ///
    /// Weights are read, quantised and written one after the other: memory is needed for the largest one, the embedding. The mix of formats is
    /// printed at the end.
    Quantize(quantize::Arguments),
    /// Gather an importance matrix from a text: which columns of each matrix matter when it is quantised.
    Imatrix(imatrix::Arguments),
    /// Read every weight once and count NaN and infinite values.
    Verify(verify::Arguments),
    /// Test every operation of a backend against f64 reference code on this machine.
    #[command(
        after_help = "Examples:\n  kimi-linear conformance --backend wgpu\n  kimi-linear conformance --backend cpu --filter kda"
    )]
    Conformance(conformance::Arguments),
    /// Measure speed: of a model shape, a checkpoint, single kernels or a server.
    Bench(bench::Arguments),
    /// Plan a remote prefill cluster (Prefill-as-a-Service) beside a local cluster, or simulate both on a request trace.
    ///
    /// Evaluates the equations of Prefill-as-a-Service (PrfaaS, arXiv 2604.15039): long prompts are prefilled in a cluster of their own, and
    /// their caches are sent over an ordinary network to the local cluster, which prefills short prompts and decodes everything. Inputs are
    /// profiles: prefill and decode times of one instance. The result is the prompt length above which a prompt is offloaded, the split of local
    /// nodes between prefill and decode, and the throughput. No GPU is needed. `--local-profile 1t-h20` gives the paper's case study. In the
    /// output PrfaaS-PD is this deployment, homogeneous is one cluster of local nodes alone, the naive split prefills every prompt remotely, and
    /// egress is what the remote cluster sends.
    #[command(
        after_help = "Examples:\n  kimi-linear plan --profile 1t-h200 --local-profile 1t-h20\n  kimi-linear plan --profile here.json --link 100G     (here.json from `kimi-linear bench --profile here.json`)"
    )]
    Plan(plan::Arguments),
    /// Print a shell completion script.
    Completions(manual::Completions),
    /// Write man pages to a folder.
    Man(manual::Manual),
}

/// Parses the command line and runs it.
pub(crate) fn run() -> ExitCode {
    let cli = match parsed() {
        Ok(cli) => cli,
        Err(error) => return failed(&error),
    };
    let log = start_log(&cli.command);
    let result = match cli.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Run(arguments) => generate::run(&arguments.into_chat()),
        Command::Chat(arguments) => chat::run(&arguments),
        #[cfg(feature = "server")]
        Command::Serve(arguments) => serve::run(*arguments),
        Command::Score(arguments) => score::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Tokenize(arguments) => tokenize::run(&arguments),
        Command::Pull(arguments) => pull::run(arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Quantize(arguments) => quantize::run(&arguments),
        Command::Imatrix(arguments) => imatrix::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Devices(arguments) => devices::run(&arguments),
        Command::Conformance(arguments) => conformance::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::manual(&arguments),
    };
    log.finish();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the pipe has closed it: a message would not be read.
        Err(error) if is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

/// The command line, with the flags of the file that `serve --config` names. Exits if it cannot be understood.
fn parsed() -> anyhow::Result<Cli> {
    let line: Vec<_> = std::env::args_os().collect();
    #[cfg(feature = "server")]
    let line = serve::with_config(&Cli::command(), line)?;
    Ok(Cli::parse_from(line))
}

/// Prints an error.
fn failed(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", sentence(error));
    ExitCode::FAILURE
}

/// An error and its causes, each said once: most errors of the library hold their cause's text in their own.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// An engine's error as this program reports it.
fn failure(error: &Arc<kimi_linear::Error>) -> anyhow::Error {
    anyhow::Error::new(Arc::clone(error))
}

/// `1 token`, `2 tokens`.
fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// Starts the log on stderr.
fn start_log(command: &Command) -> Log {
    match command {
        #[cfg(feature = "server")]
        Command::Serve(arguments) => Log::of_a_server(arguments.log_format()),
        _ => Log::of_a_command(),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == ErrorKind::BrokenPipe)
}

/// Prints a value as JSON on one line of stdout.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, value)?;
    writeln!(stdout)?;
    Ok(())
}
