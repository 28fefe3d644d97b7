//! What else stands on vLLM's command lines: taken where it changes nothing, refused with a sentence where it would.

use anyhow::{Result, bail, ensure};
use clap::Args;

/// Flags of vLLM's that this server has no use for, or does not have.
#[derive(Args)]
#[command(next_help_heading = "For vLLM's command lines")]
pub(super) struct Vllm {
    /// Taken, and without effect: no code of a checkpoint is run.
    #[arg(long)]
    trust_remote_code: bool,
    /// Taken, and without effect: tools are called where a request brings some.
    #[arg(long)]
    enable_auto_tool_choice: bool,
    /// Taken, and without effect: nothing that is computed differs by it.
    #[arg(long)]
    enforce_eager: bool,
    /// How the model writes calls: kimi_k2, the only way that it has.
    #[arg(long, value_name = "NAME")]
    tool_call_parser: Option<String>,
    /// Where sampling defaults come from: vllm, which is to say that there are none but OpenAI's.
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
    /// Refuses what would change an answer, or its safety, and is not there.
    pub(super) fn check(&self) -> Result<()> {
        let absent = [
            (
                &self.reasoning_parser,
                "reasoning-parser",
                "what a model reasons stays in its text here",
            ),
            (&self.uds, "uds", "it listens on --host and --port alone"),
            (
                &self.ssl_keyfile,
                "ssl-keyfile",
                "there is no TLS for clients: put a proxy that has it in front",
            ),
            (
                &self.ssl_certfile,
                "ssl-certfile",
                "there is no TLS for clients: put a proxy that has it in front",
            ),
            (
                &self.ssl_ca_certs,
                "ssl-ca-certs",
                "there is no TLS for clients: put a proxy that has it in front",
            ),
            (
                &self.root_path,
                "root-path",
                "paths begin at / here: have the proxy in front take the prefix off",
            ),
            (
                &self.config,
                "config",
                "flags are read from the command line alone",
            ),
        ];
        for (value, name, why) in absent {
            if value.is_some() {
                bail!("--{name}: {why}");
            }
        }
        if let Some(parser) = &self.tool_call_parser {
            ensure!(
                parser == "kimi_k2",
                "--tool-call-parser {parser}: this model writes calls in one way, which is called kimi_k2"
            );
        }
        if let Some(from) = &self.generation_config {
            ensure!(
                from == "vllm",
                "--generation-config {from}: sampling defaults are not read from files; `vllm` says so"
            );
        }
        Ok(())
    }

    /// Says of what was taken that it has no effect.
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
