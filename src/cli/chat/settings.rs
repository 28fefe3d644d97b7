//! `/set`: the sampling parameters of a conversation, which may change between two answers.

use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Result, anyhow};
use kimi_linear::engine::Sampling;
use kimi_linear::llm::Generation;

use super::super::options::parse_max_tokens;

/// Changes one parameter: `temperature 0.7`. A refused value changes no parameter.
pub(super) fn set(generation: &mut Generation, vocabulary: usize, text: &str) -> Result<()> {
    let (name, value) = text
        .split_once(|c: char| c.is_whitespace() || c == '=')
        .ok_or_else(|| anyhow!("a parameter and its value are needed: /set temperature 0.7"))?;
    let value = value.trim().trim_start_matches('=').trim();
    let mut changed = generation.clone();
    let sampling = &mut changed.sampling;
    match name {
        "temperature" | "temp" => sampling.temperature = number(name, value)?,
        "top_k" => sampling.top_k = number(name, value)?,
        "top_p" => sampling.top_p = number(name, value)?,
        "min_p" => sampling.min_p = number(name, value)?,
        "repetition_penalty" | "repeat_penalty" => {
            sampling.repetition_penalty = number(name, value)?
        }
        "presence_penalty" => sampling.presence_penalty = number(name, value)?,
        "frequency_penalty" => sampling.frequency_penalty = number(name, value)?,
        "seed" => sampling.seed = number(name, value)?,
        "max_tokens" => {
            changed.max_tokens = parse_max_tokens(value).map_err(|reason| anyhow!(reason))?;
        }
        _ => {
            return Err(anyhow!(
                "there is no parameter `{name}`; /set shows them all"
            ));
        }
    }
    changed.sampling.check(vocabulary)?;
    *generation = changed;
    Ok(())
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| anyhow!("{name}: `{value}` is not a number that it can take"))
}

/// All parameters, a line each.
pub(super) fn show(generation: &Generation) -> String {
    let Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        ..
    } = &generation.sampling;
    let max_tokens = match generation.max_tokens {
        usize::MAX => "-1 (no limit)".to_owned(),
        limit => limit.to_string(),
    };
    let rows: [(&str, &dyn Display); 9] = [
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
        ("min_p", min_p),
        ("repetition_penalty", repetition_penalty),
        ("presence_penalty", presence_penalty),
        ("frequency_penalty", frequency_penalty),
        ("seed", seed),
        ("max_tokens", &max_tokens),
    ];
    rows.map(|(name, value)| format!("{name:<18}  {value}"))
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_or_refused() {
        let mut settings = Generation::default();
        for text in ["temperature 0.5", "max_tokens = 2K", "seed=7"] {
            set(&mut settings, 100, text).unwrap();
        }
        assert_eq!(settings.sampling.temperature, 0.5);
        assert_eq!((settings.max_tokens, settings.sampling.seed), (2048, 7));
        let before = settings.clone();
        for (text, refusal) in [
            ("temperature", "a parameter and its value"),
            ("temperature -1", "0 or more"),
            ("top_k many", "`many` is not a number"),
            ("warmth 3", "no parameter `warmth`"),
        ] {
            let error = set(&mut settings, 100, text).unwrap_err().to_string();
            assert!(error.contains(refusal), "{text}: {error}");
            assert_eq!(settings, before);
        }
        assert!(show(&settings).contains("temperature         0.5"));
    }
}
