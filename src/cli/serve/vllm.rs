//! Other flags of vLLM: accepted if ignoring them changes no result, otherwise rejected with an error that says what to do.

use anyhow::{Result, ensure};
use clap::Args;
use kimi_linear::server::ReasoningParser;

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
    /// No effect; the environment variable KIMI_LINEAR_GRAPHS=0 turns CUDA graphs off.
    #[arg(long)]
    enforce_eager: bool,
    /// Format of the model's tool calls. Only kimi_k2 is supported.
    #[arg(long, value_name = "NAME")]
    tool_call_parser: Option<String>,
    /// Separate the reasoning of an answer, the text up to </think>, from its text: deepseek_r1, deepseek_v3, glm45, holo2, kimi_k2,
    /// minimax_m2, nemotron_v3, olmo3, qwen3 or step3. Default: it stays in the text.
    #[arg(long, value_name = "NAME")]
    pub(super) reasoning_parser: Option<ReasoningParser>,
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
