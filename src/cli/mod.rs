//! The command line: one file per subcommand, each a small client of the library.
//!
//! Results go to stdout, all else to stderr; `--json` prints one JSON object and nothing else. Errors are one line and
//! exit with 1; a command line that cannot be understood exits with 2, as clap does.

mod bench;
mod chat;
mod conformance;
mod devices;
mod eval;
mod generate;
mod inspect;
mod log;
mod manual;
mod options;
mod plan;
mod progress;
mod score;
#[cfg(feature = "server")]
mod serve;
mod tokenize;
mod verify;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};

use self::log::Log;

#[derive(Parser)]
#[command(
    name = "kimi-linear",
    version,
    about = "Run Kimi Linear, the hybrid linear-attention language model"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, or answer a chat.
    Generate(generate::Arguments),
    /// Answer one question: `generate --chat`.
    Run(generate::Arguments),
    /// Talk with the model in the terminal.
    Chat(chat::Arguments),
    /// Serve a model to OpenAI's clients over HTTP.
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
    /// Measure how likely a text is: negative log-likelihood, perplexity, logits.
    Score(score::Arguments),
    /// Ask questions whose answers are known, and count the exact ones.
    Eval(eval::Arguments),
    /// Show the token ids of a text or a chat.
    Tokenize(tokenize::Arguments),
    /// Show what a model is made of, what its weights are kept in and what memory it needs; loads nothing.
    Inspect(inspect::Arguments),
    /// Read every weight once and count the numbers that are not finite.
    Verify(verify::Arguments),
    /// List the devices that a model can run on.
    Devices(devices::Arguments),
    /// Prove that a device and its driver compute what they should.
    Conformance(conformance::Arguments),
    /// Measure speed.
    Bench(bench::Arguments),
    /// Plan a prefill cluster beside a local one (Prefill-as-a-Service), or replay a trace on both.
    ///
    /// A model of two clusters, fed with profiles: the equations of Prefill-as-a-Service (arXiv 2604.15039), which offloads the prefill of
    /// long prompts to a cluster of its own and ships their caches over an ordinary network. Without options it plans the prompts of
    /// the paper's case study; with `--local-profile 1t-h20` all of it.
    Plan(plan::Arguments),
    /// Print completions for a shell.
    Completions(manual::Completions),
    /// Write the pages of the manual into a folder.
    Man(manual::Manual),
}

/// Parses the command line and runs it.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    let log = start_log(&cli.command);
    let result = match cli.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Run(arguments) => generate::run(&arguments.into_chat()),
        Command::Chat(arguments) => chat::run(&arguments),
        #[cfg(feature = "server")]
        Command::Serve(arguments) => serve::run(arguments),
        Command::Score(arguments) => score::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Tokenize(arguments) => tokenize::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
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
        // The reader of a pipe went away: nobody is left to tell.
        Err(error) if is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
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
