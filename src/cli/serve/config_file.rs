//! `--config FILE.yaml`: flags of `serve` from a file, as in vLLM. Those on the command line win.
//!
//! The file's flags are added to the command line, which is then parsed as a whole: they are checked as if they were typed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use yaml_rust2::{Yaml, YamlLoader};

use super::super::options::read_text;

/// The name of the subcommand.
const SERVE: &str = "serve";

/// The command line with the flags of the file that it names. Underscores in the names of flags become dashes, as in vLLM. A
/// command line that cannot be parsed, or is of another subcommand, is returned as it is.
///
/// # Errors
/// A file that cannot be read or is not YAML, an unknown flag in it, or a value that the flag cannot have.
pub(crate) fn with_config(command: &Command, mut line: Vec<OsString>) -> Result<Vec<OsString>> {
    if line.get(1).is_none_or(|name| name != SERVE) {
        return Ok(line);
    }
    for argument in &mut line {
        if let Some(dashed) = argument.to_str().and_then(with_dashes) {
            *argument = dashed.into();
        }
    }
    let Ok(matches) = command.clone().try_get_matches_from(&line) else {
        return Ok(line);
    };
    let (Some(given), Some(serve)) = (
        matches.subcommand_matches(SERVE),
        command.find_subcommand(SERVE),
    ) else {
        return Ok(line);
    };
    let Some(path) = given.get_one::<PathBuf>("config") else {
        return Ok(line);
    };
    let flags =
        flags(serve, given, path).with_context(|| format!("--config {}", path.display()))?;
    // What comes after `--` are no flags.
    let end = line.iter().position(|argument| argument == "--");
    let end = end.unwrap_or(line.len());
    line.splice(end..end, flags);
    Ok(line)
}

/// `--max_model_len=8` with dashes in the flag's name; `None` if it has no underscores.
fn with_dashes(argument: &str) -> Option<String> {
    let (name, value) = match argument.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (argument, None),
    };
    if !name.starts_with("--") || !name.contains('_') {
        return None;
    }
    let name = name.replace('_', "-");
    Some(value.map_or(name.clone(), |value| format!("{name}={value}")))
}

/// The flags of a file that the command line does not give.
fn flags(serve: &Command, given: &ArgMatches, path: &Path) -> Result<Vec<OsString>> {
    let documents = YamlLoader::load_from_str(&read_text(path)?).context("this is not YAML")?;
    let entries = match documents.as_slice() {
        [] | [Yaml::Null] => return Ok(Vec::new()),
        [Yaml::Hash(entries)] => entries,
        _ => bail!("a mapping of flags to values is expected, such as `port: 8000`"),
    };
    let mut flags = Vec::new();
    for (name, value) in entries {
        let Some(name) = name.as_str() else {
            bail!("the name of a flag should be a text, but is {name:?}");
        };
        let name = name.replace('_', "-");
        let find = |name: &str| serve.get_arguments().find(|flag| is_called(flag, name));
        let Some(flag) = find(&name).filter(|flag| flag.get_id() != "config") else {
            bail!(
                "`{name}` is not a flag that a file can hold; `kimi-linear serve --help` lists them"
            );
        };
        if is_given(given, flag) {
            continue;
        }
        match (flag.get_action(), value) {
            (_, Yaml::Null) => {}
            (ArgAction::SetTrue, Yaml::Boolean(true)) => flags.push(format!("--{name}")),
            (ArgAction::SetTrue, Yaml::Boolean(false)) => {
                let no = format!("no-{name}");
                flags.extend(find(&no).map(|_| format!("--{no}")));
            }
            (ArgAction::SetTrue, _) => bail!("`{name}` is true or false"),
            (_, Yaml::Array(list)) => {
                for item in list {
                    flags.push(format!("--{name}={}", text(&name, item)?));
                }
            }
            (_, value) => flags.push(format!("--{name}={}", text(&name, value)?)),
        }
    }
    Ok(flags.into_iter().map(OsString::from).collect())
}

fn is_called(flag: &Arg, name: &str) -> bool {
    let aliases = flag.get_all_aliases().unwrap_or_default();
    flag.get_long() == Some(name) || aliases.contains(&name)
}

/// Whether the command line says it: by this flag, by the one that negates it, or by the argument that names the model.
fn is_given(given: &ArgMatches, flag: &Arg) -> bool {
    let is_typed = |id: &str| {
        given.try_contains_id(id).is_ok()
            && given.value_source(id) == Some(ValueSource::CommandLine)
    };
    let id = flag.get_id().as_str();
    let negated = match id.strip_prefix("no_") {
        Some(positive) => positive.to_owned(),
        None => format!("no_{id}"),
    };
    is_typed(id) || is_typed(&negated) || (id == "model" && is_typed("model_path"))
}

/// A value as it is typed; mappings as JSON, in the flags that take it.
fn text(name: &str, value: &Yaml) -> Result<String> {
    Ok(match value {
        Yaml::String(text) | Yaml::Real(text) => text.clone(),
        Yaml::Integer(number) => number.to_string(),
        Yaml::Boolean(flag) => flag.to_string(),
        other => json(name, other)?.to_string(),
    })
}

fn json(name: &str, value: &Yaml) -> Result<serde_json::Value> {
    use serde_json::Value;
    Ok(match value {
        Yaml::String(text) => Value::from(text.as_str()),
        Yaml::Integer(number) => Value::from(*number),
        Yaml::Boolean(flag) => Value::from(*flag),
        Yaml::Null => Value::Null,
        Yaml::Real(text) => {
            let number: f64 = text
                .parse()
                .with_context(|| format!("`{name}`: `{text}`"))?;
            Value::from(number)
        }
        Yaml::Array(list) => {
            let items = list.iter().map(|item| json(name, item));
            Value::Array(items.collect::<Result<_>>()?)
        }
        Yaml::Hash(entries) => {
            let entry = |(key, value): (&Yaml, &Yaml)| {
                let key = key.as_str().map(str::to_owned);
                let key = key.with_context(|| format!("`{name}`: keys should be texts"))?;
                Ok((key, json(name, value)?))
            };
            Value::Object(entries.iter().map(entry).collect::<Result<_>>()?)
        }
        Yaml::Alias(_) | Yaml::BadValue => {
            ensure!(false, "`{name}` has a value that cannot be read");
            Value::Null
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::{Args, CommandFactory, Parser};

    use super::*;
    use crate::cli::serve::Arguments;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Commands,
    }

    #[derive(clap::Subcommand)]
    enum Commands {
        Serve(Box<Arguments>),
        Other(Other),
    }

    #[derive(Args)]
    struct Other {
        #[arg(long)]
        some_flag: bool,
    }

    fn line(arguments: &[&str]) -> Result<Vec<String>> {
        let line = ["kimi-linear"].iter().chain(arguments).map(OsString::from);
        let line = with_config(&Cli::command(), line.collect())?;
        let line = line.into_iter().skip(1);
        Ok(line
            .map(|argument| argument.into_string().unwrap())
            .collect())
    }

    fn with_file(text: &str, more: &[&str]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.yaml");
        std::fs::write(&path, text).unwrap();
        let config = ["serve", "--config", path.to_str().unwrap()];
        let line = line(&[&config, more].concat())?;
        Ok(line[3..].to_vec())
    }

    #[test]
    fn flags_of_a_file_follow_the_command_line() {
        let text = "model: some/folder\nport: 8001\nmax_model_len: 4k\nenforce-eager: true\n\
            enable-prefix-caching: false\nlog-content: false\nserved-model-name: [a, b]\n\
            gpu-memory-utilization: 0.50\nseed:\noverride-generation-config: {temperature: 0.5, top_k: 3}\n";
        let expected = [
            "--model=some/folder",
            "--port=8001",
            "--max-model-len=4k",
            "--enforce-eager",
            "--no-enable-prefix-caching",
            "--served-model-name=a",
            "--served-model-name=b",
            "--gpu-memory-utilization=0.50",
            r#"--override-generation-config={"temperature":0.5,"top_k":3}"#,
        ];
        assert_eq!(with_file(text, &[]).unwrap(), expected);
        assert!(with_file("", &[]).unwrap().is_empty());
    }

    #[test]
    fn the_command_line_wins() {
        let text = "model: some/folder\nport: 8001\nenable-prefix-caching: true\nhost: 0.0.0.0\n";
        let typed = ["other", "--port", "9", "--no_enable_prefix_caching"];
        let found = with_file(text, &typed).unwrap();
        let expected = [
            "other",
            "--port",
            "9",
            "--no-enable-prefix-caching",
            "--host=0.0.0.0",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_not_a_flag_is_named() {
        for (text, part) in [
            ("prot: 1", "`prot` is not a flag"),
            ("config: other.yaml", "`config` is not a flag"),
            ("- port", "a mapping of flags to values"),
            ("port: [", "not YAML"),
            ("enforce-eager: 1", "`enforce-eager` is true or false"),
        ] {
            let error = with_file(text, &[]).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
        let absent = line(&["serve", "--config", "no/such.yaml"]).unwrap_err();
        assert!(format!("{absent:#}").contains("no/such.yaml"));
    }

    #[test]
    fn other_command_lines_stay_as_they_are() {
        let other = ["other", "--some_flag"];
        assert_eq!(line(&other).unwrap(), other);
        let wrong = ["serve", "--no-such-flag"];
        assert_eq!(line(&wrong).unwrap(), wrong);
        assert_eq!(
            line(&["serve", "--max_model_len=a_b"]).unwrap(),
            ["serve", "--max-model-len=a_b"]
        );
    }
}
