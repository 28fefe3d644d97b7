//! What `--model` names: a path, or a model of the hub that was pulled. Everything else is refused with what to do about it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kimi_linear_hub::{ModelName, Settings};

/// The path of a model, which is in the hub's cache if it is named as there.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        check(path)?;
        return Ok(path.to_owned());
    }
    let name = path.display().to_string();
    let Some(model) = on_hub(path) else {
        bail!("{}", absent(&name));
    };
    let settings = Settings::from_environment()?;
    match kimi_linear_hub::find(&settings, &model)? {
        Some(path) => Ok(path),
        None if is_below_a_folder(path) => bail!("{}", absent(&name)),
        None => bail!(
            "there is no file or folder `{name}`. It looks like a model on the Hugging Face hub, which is not, or not in full, in the cache {}: \
             `kimi-linear pull {name}` downloads it, `kimi-linear inspect {name}` says what it would take (the 48B model is 98 GB in bf16)",
            settings.cache.display()
        ),
    }
}

/// The name of a model on the hub, if it is not a path of something that is there.
pub(crate) fn on_hub(path: &Path) -> Option<ModelName> {
    let name = path.to_str()?.parse().ok()?;
    (!path.exists()).then_some(name)
}

/// Whether the first part of a path is a folder: the rest is then more likely to be mistyped than the name of a model on the hub.
pub(crate) fn is_below_a_folder(path: &Path) -> bool {
    path.iter()
        .next()
        .is_some_and(|first| Path::new(first).exists())
}

/// Refuses a path that is no model.
fn check(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let name = path.display();
    let mut first = Vec::new();
    let file = File::open(path).and_then(|file| file.take(64).read_to_end(&mut first));
    file.with_context(|| format!("cannot read {name}"))?;
    if first.starts_with(b"version https://git-lfs") {
        bail!(
            "{name} is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`, or download it again"
        );
    }
    if path
        .extension()
        .is_some_and(|ending| ending == "safetensors")
    {
        bail!("{name} holds weights alone: --model takes the folder that it is in");
    }
    Ok(())
}

/// The error for a path that does not exist and is no name on the hub.
fn absent(name: &str) -> String {
    if let Some((_, rest)) = name.split_once("://") {
        let parts: Vec<&str> = rest.split('/').skip(1).take(2).collect();
        let [owner, model] = parts[..] else {
            return format!("{name} is a URL: download the model, then --model FOLDER");
        };
        return format!(
            "{name} is a URL: `kimi-linear pull {owner}/{model}` downloads the model, then --model {owner}/{model}"
        );
    }
    match name {
        "demo" => "there is no `demo` here; the demo model is what runs without --model".to_owned(),
        "48b" => "there is no `48b` here; for its shape alone there is --shape 48b (inspect, bench). The model is 98 GB in bf16: \
                  `kimi-linear pull moonshotai/Kimi-Linear-48B-A3B-Instruct` downloads it"
            .to_owned(),
        _ => format!("there is no file or folder `{name}`"),
    }
}
