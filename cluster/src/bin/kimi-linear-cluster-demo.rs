//! Two clusters of Kimi Linear on this machine with a shaped link between them: `kimi-linear-cluster-demo --help`.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use kimi_linear_cluster::demo::{self, options::Options};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match demo::run(options).await {
        Ok(report) => {
            let text = std::fs::read_to_string(&report).unwrap_or_default();
            // A terminal that is gone has no reader.
            let _ = write!(
                std::io::stdout(),
                "\n{text}\nwritten to {}\n",
                report.display()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
