//! Other flags of vLLM: accepted if ignoring them changes no result, otherwise rejected with an error that says what to do.

use anyhow::{Result, ensure};
use clap::Args;

/// Flags of vLLM that have no effect here.
#[derive(Args)]
#[command(next_help_heading = "Compatibility with vLLM")]
pub(super) struct Vllm {
    /// No effect: a checkpoint's code is never run.
    #[arg(long)]
    trust_remote_code: bool,
    /// No effect: the model may always call the tools of a request.
    #[arg(long)]
    enable_auto_tool_choice: bool,
    /// No effect on results.
    #[arg(long)]
    enforce_eager: bool,
    /// Format of the model's tool calls. Only kimi_k2 is supported.
    #[arg(long, value_name = "NAME")]
    tool_call_parser: Option<String>,
    /// Source of the sampling defaults. Only vllm is supported: OpenAI's defaults, and none from the checkpoint.
    #[arg(long, value_name = "NAME")]
    generation_config: Option<String>,
    #[arg(long, value_name = "NAME", hide = true)]
    reasoning_parser: Option<String>,
    #[arg(long, value_name = "PATH", hide = true)]
    uds: Option<String>,
    #[arg(long, value_name = "FILE", hide = true)]
    ssl_keyfile: Option<String>,
    #[arg(long, value_name = "FILE", hide = true)]
    ssl_certfile: Option<String>,
    #[arg(long, value_name = "FILE", hide = true)]
    ssl_ca_certs: Option<String>,
    #[arg(long, value_name = "PATH", hide = true)]
    root_path: Option<String>,
    #[arg(long, value_name = "FILE", hide = true)]
    config: Option<String>,
}

impl Vllm {
    /// Rejects a format of tool calls that is not the model's.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(parser) = &self.tool_call_parser {
            ensure!(
                parser == "kimi_k2",
                "--tool-call-parser {parser}: only kimi_k2 is supported, the format of this model's tool calls"
            );
        }
        Ok(())
    }

    /// Logs which of the given flags have no effect.
    pub(super) fn tell(&self) {
        let taken = [
            (self.trust_remote_code, "trust-remote-code"),
            (self.enable_auto_tool_choice, "enable-auto-tool-choice"),
            (self.enforce_eager, "enforce-eager"),
        ];
        for (_, name) in taken.iter().filter(|(given, _)| *given) {
            tracing::info!("--{name} has no effect here");
        }
    }
}
