//! Other flags of vLLM: accepted if ignoring them changes no result, otherwise rejected with an error that says what to do.

use anyhow::{Result, bail, ensure};
use clap::Args;

/// Flags of vLLM that have no effect here or are not supported.
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
    /// Rejects flags that would change results or security and are not supported.
    pub(super) fn check(&self) -> Result<()> {
        let absent = [
            (
                &self.reasoning_parser,
                "reasoning-parser",
                "reasoning is not separated from the text of an answer; leave the flag out",
            ),
            (
                &self.uds,
                "uds",
                "Unix sockets are not supported; use --host and --port",
            ),
            (
                &self.ssl_keyfile,
                "ssl-keyfile",
                "TLS for clients is not supported; put a proxy with TLS in front",
            ),
            (
                &self.ssl_certfile,
                "ssl-certfile",
                "TLS for clients is not supported; put a proxy with TLS in front",
            ),
            (
                &self.ssl_ca_certs,
                "ssl-ca-certs",
                "TLS for clients is not supported; put a proxy with TLS in front",
            ),
            (
                &self.root_path,
                "root-path",
                "path prefixes are not supported; have the proxy remove the prefix",
            ),
            (
                &self.config,
                "config",
                "configuration files are not supported; give the flags on the command line",
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
                "--tool-call-parser {parser}: only kimi_k2 is supported, the format of this model's tool calls"
            );
        }
        if let Some(from) = &self.generation_config {
            ensure!(
                from == "vllm",
                "--generation-config {from}: sampling defaults are not read from files; use `vllm` or leave the flag out"
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
