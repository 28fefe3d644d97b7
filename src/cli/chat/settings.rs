//! `/set`: the sampling parameters of a conversation, which may change between two answers.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, anyhow};
use kimi_linear::engine::Sampling;

use super::super::options::parse_token_limit;

/// How answers are made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) sampling: Sampling,
    pub(super) max_tokens: usize,
    /// The size of the vocabulary, against which parameters are checked.
    pub(super) vocabulary: usize,
}

impl Settings {
    /// Changes one parameter: `temperature 0.7`. Nothing changes where the value is refused.
    pub(super) fn set(&mut self, text: &str) -> Result<()> {
        let (name, value) = text
            .split_once(|c: char| c.is_whitespace() || c == '=')
            .ok_or_else(|| anyhow!("a parameter and its value are needed: /set temperature 0.7"))?;
        let value = value.trim().trim_start_matches('=').trim();
        let mut changed = self.clone();
        let sampling = &mut changed.sampling;
        match name {
            "temperature" => sampling.temperature = number(name, value)?,
            "top_k" => sampling.top_k = number(name, value)?,
            "top_p" => sampling.top_p = number(name, value)?,
            "min_p" => sampling.min_p = number(name, value)?,
            "repetition_penalty" => sampling.repetition_penalty = number(name, value)?,
            "presence_penalty" => sampling.presence_penalty = number(name, value)?,
            "frequency_penalty" => sampling.frequency_penalty = number(name, value)?,
            "seed" => sampling.seed = number(name, value)?,
            "max_tokens" => {
                changed.max_tokens = parse_token_limit(value).map_err(|reason| anyhow!(reason))?;
            }
            _ => {
                return Err(anyhow!(
                    "there is no parameter `{name}`; /set shows them all"
                ));
            }
        }
        changed.sampling.check(self.vocabulary)?;
        *self = changed;
        Ok(())
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| anyhow!("{name}: `{value}` is not a number that it can take"))
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        } = &self.sampling;
        writeln!(f, "temperature         {temperature}")?;
        writeln!(f, "top_k               {top_k}")?;
        writeln!(f, "top_p               {top_p}")?;
        writeln!(f, "min_p               {min_p}")?;
        writeln!(f, "repetition_penalty  {repetition_penalty}")?;
        writeln!(f, "presence_penalty    {presence_penalty}")?;
        writeln!(f, "frequency_penalty   {frequency_penalty}")?;
        writeln!(f, "seed                {seed}")?;
        write!(f, "max_tokens          {}", self.max_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_or_refused() {
        let mut settings = Settings {
            sampling: Sampling::GREEDY,
            max_tokens: 10,
            vocabulary: 100,
        };
        settings.set("temperature 0.5").unwrap();
        settings.set("max_tokens = 2K").unwrap();
        settings.set("seed=7").unwrap();
        assert_eq!(settings.sampling.temperature, 0.5);
        assert_eq!((settings.max_tokens, settings.sampling.seed), (2048, 7));
        let before = settings.clone();
        for (text, refusal) in [
            ("temperature", "a parameter and its value"),
            ("temperature -1", "0 or more"),
            ("top_k many", "`many` is not a number"),
            ("warmth 3", "no parameter `warmth`"),
        ] {
            let error = settings.set(text).unwrap_err().to_string();
            assert!(error.contains(refusal), "{text}: {error}");
            assert_eq!(settings, before);
        }
        assert!(settings.to_string().contains("temperature         0.5"));
    }
}
