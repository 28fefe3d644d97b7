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

/// A number of tokens as vLLM reads it: `4k` is 4,000 and `4K` 4,096; before a small letter there may be a fraction.
pub(super) fn token_count(text: &str) -> Result<usize, String> {
    let wrong = || {
        format!("`{text}` should be a whole number of tokens, such as 4096, 4k (4000) or 4K (4096)")
    };
    let scales = [("k", 1e3), ("m", 1e6), ("g", 1e9)];
    let small = scales
        .iter()
        .find_map(|(letter, scale)| Some((text.strip_suffix(letter)?, *scale)));
    let number = match small {
        Some((digits, scale)) => {
            let plain = digits
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.');
            let number: f64 = digits.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
            (number * scale) as usize
        }
        None => {
            let scales = [("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)];
            let large = scales
                .iter()
                .find_map(|(letter, scale)| Some((text.strip_suffix(letter)?, *scale)));
            let (digits, scale) = large.unwrap_or((text, 1));
            let number: usize = digits.parse().map_err(|_| wrong())?;
            number.checked_mul(scale).ok_or_else(wrong)?
        }
    };
    match number {
        0 | 1 => Err("prompt and answer need two tokens at least".to_owned()),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_are_vllms() {
        for (text, count) in [
            ("4096", 4096),
            ("4k", 4000),
            ("4K", 4096),
            ("25.6k", 25_600),
            ("1M", 1 << 20),
            ("1m", 1_000_000),
        ] {
            assert_eq!(token_count(text), Ok(count), "{text}");
        }
        for text in [
            "",
            "k",
            "1",
            "0",
            "-4",
            "4.5K",
            "1e3k",
            "4kk",
            "99999999999999999999G",
        ] {
            assert!(token_count(text).is_err(), "{text}");
        }
    }
}
