//! `quantization_config`: what a file says of how its weights are quantised. What is in the file of weights decides; this is
//! held against it.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::fields::{Fields, kind, show, whole, wrong};
use crate::error::ConfigError;

/// What the configuration says of quantised weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantization {
    groups: Vec<Group>,
    ignore: Vec<Target>,
    block: Option<[usize; 2]>,
    /// What MLX says of single modules, by its names for them: how they are quantised, or `None` where they are not.
    modules: BTreeMap<String, Option<Group>>,
}

/// How a weight was found to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedAs {
    /// Bits of a code.
    pub bits: usize,
    /// Whether codes are floats.
    pub float: bool,
    /// Whether there are no zero points; `None` where the scheme knows none.
    pub symmetric: Option<bool>,
    /// Columns that share a scale; `None` where a whole row or a block does.
    pub group: Option<usize>,
}

/// Modules that are quantised alike.
#[derive(Debug, Clone, PartialEq)]
struct Group {
    targets: Vec<Target>,
    bits: usize,
    float: Option<bool>,
    symmetric: Option<bool>,
    group: Option<usize>,
}

/// Which modules.
#[derive(Debug, Clone)]
enum Target {
    /// A module by its name, or every module of a class.
    Named(String),
    /// Modules whose names begin with what the pattern matches, as Python's `re.match` has it.
    Pattern(String, Box<Regex>),
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Named(a), Self::Named(b)) | (Self::Pattern(a, _), Self::Pattern(b, _)) => a == b,
            _ => false,
        }
    }
}

impl Target {
    fn parse(field: &str, value: &Value) -> Result<Self, ConfigError> {
        let text = value
            .as_str()
            .ok_or_else(|| wrong(field, "a list of names and patterns", value))?;
        let Some(pattern) = text.strip_prefix("re:") else {
            return Ok(Self::Named(text.to_owned()));
        };
        let regex =
            Regex::new(&format!("^(?:{pattern})")).map_err(|error| ConfigError::Invalid {
                field: field.to_owned(),
                expected: "a regular expression after re:".to_owned(),
                found: format!("{} ({error})", show(value)),
            })?;
        Ok(Self::Pattern(pattern.to_owned(), Box::new(regex)))
    }

    fn list(field: &str, value: Option<&Value>) -> Result<Vec<Self>, ConfigError> {
        match value {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                list.iter().map(|entry| Self::parse(field, entry)).collect()
            }
            Some(other) => Err(wrong(field, "a list of names and patterns", other)),
        }
    }

    /// Whether it names this module, or its class: a projection's is `Linear`.
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Named(name) => {
                let embedding = module.ends_with("embed_tokens");
                let class = if embedding { "Embedding" } else { "Linear" };
                name == module || name == class
            }
            // A pattern that takes too many steps matches nothing.
            Self::Pattern(_, regex) => regex.is_match(module).unwrap_or(false),
        }
    }
}

impl Quantization {
    /// Rows and columns of the blocks that share a scale, where it says so.
    pub(crate) fn block(&self) -> Option<[usize; 2]> {
        self.block
    }

    /// Whether a module may be stored like this; otherwise the contradiction in words.
    pub(crate) fn agrees(&self, module: &str, stored: &QuantizedAs) -> Result<(), String> {
        if self.ignore.iter().any(|target| target.matches(module)) {
            return Err("quantised, though quantization_config's ignore names it".to_owned());
        }
        match self.modules.get(&mlx_name(module)) {
            Some(Some(own)) if own.describes(stored) => return Ok(()),
            Some(Some(own)) => {
                return Err(format!("quantization says {own} for it, found {stored}"));
            }
            Some(None) => return Err("quantised, though quantization says false".to_owned()),
            None => {}
        }
        let targeted = |group: &&Group| group.targets.iter().any(|target| target.matches(module));
        let groups: Vec<&Group> = self.groups.iter().filter(targeted).collect();
        if groups.is_empty() {
            return match self.groups.is_empty() {
                true => Ok(()),
                false => {
                    Err("quantised, though no group of quantization_config targets it".to_owned())
                }
            };
        }
        if groups.iter().any(|group| group.describes(stored)) {
            return Ok(());
        }
        let said: Vec<String> = groups.iter().map(|group| group.to_string()).collect();
        Err(format!(
            "quantization_config says {}, found {stored}",
            said.join(" or ")
        ))
    }
}

impl Group {
    fn describes(&self, stored: &QuantizedAs) -> bool {
        let symmetric = match (self.symmetric, stored.symmetric) {
            (Some(said), Some(found)) => said == found,
            _ => true,
        };
        self.bits == stored.bits
            && self.float.is_none_or(|float| float == stored.float)
            && symmetric
            && (self.group.is_none() || stored.group.is_none() || self.group == stored.group)
    }
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        words(f, self.bits, self.float, self.symmetric, self.group)
    }
}

impl std::fmt::Display for QuantizedAs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        words(f, self.bits, Some(self.float), self.symmetric, self.group)
    }
}

fn words(
    f: &mut std::fmt::Formatter<'_>,
    bits: usize,
    float: Option<bool>,
    symmetric: Option<bool>,
    group: Option<usize>,
) -> std::fmt::Result {
    let symmetric = match symmetric {
        Some(true) => "symmetric ",
        Some(false) => "asymmetric ",
        None => "",
    };
    let codes = match float {
        Some(true) => "floats",
        Some(false) => "integers",
        None => "codes",
    };
    write!(f, "{symmetric}{codes} of {bits} bits")?;
    match group {
        Some(group) => write!(f, " in groups of {group}"),
        None => Ok(()),
    }
}

/// Reads `quantization_config`, by any of its names.
pub(super) fn quantization(fields: &Fields<'_>) -> Result<Option<Quantization>, ConfigError> {
    let names = ["quantization_config", "compression_config", "quantization"];
    let mut found = names
        .iter()
        .filter_map(|name| Some((*name, fields.at(name)?)));
    let Some((name, value)) = found.next() else {
        return Ok(None);
    };
    let Value::Object(config) = value else {
        return Err(wrong(name, "an object", value));
    };
    let mlx = config.contains_key("bits") && config.contains_key("group_size");
    let method = config.get("quant_method").and_then(Value::as_str);
    match method {
        Some("compressed-tensors") => compressed_tensors(name, config).map(Some),
        None if config.contains_key("config_groups") => compressed_tensors(name, config).map(Some),
        Some("fp8") => fp8(name, config).map(Some),
        Some("modelopt") => modelopt(name, config).map(Some),
        None if mlx => self::mlx(name, config).map(Some),
        other => Err(ConfigError::Quantised {
            method: other.unwrap_or("not named").to_owned(),
        }),
    }
}

fn compressed_tensors(
    name: &str,
    config: &Map<String, Value>,
) -> Result<Quantization, ConfigError> {
    let set =
        |value: &Value| !value.is_null() && value.as_object().is_none_or(|map| !map.is_empty());
    let unsupported = |key: &str, expected, value: &Value| ConfigError::Unsupported {
        field: format!("{name}.{key}"),
        expected,
        found: show(value),
    };
    if let Some(value) = config.get("transform_config").filter(|value| set(value)) {
        return Err(unsupported(
            "transform_config",
            "none (weights are not rotated)",
            value,
        ));
    }
    if let Some(value) = config.get("sparsity_config").filter(|value| set(value)) {
        let format = value.get("format").and_then(Value::as_str);
        if format.is_some_and(|format| format != "dense") {
            return Err(unsupported("sparsity_config", "the format dense", value));
        }
    }
    if let Some(value) = config.get("kv_cache_scheme").filter(|value| set(value)) {
        tracing::warn!(
            "{name}.kv_cache_scheme ({}): not used, caches have a dtype of their own",
            show(value)
        );
    }
    let groups = match config.get("config_groups") {
        Some(Value::Object(groups)) => groups,
        other => {
            let field = format!("{name}.config_groups");
            return Err(wrong(
                &field,
                "an object of groups",
                other.unwrap_or(&Value::Null),
            ));
        }
    };
    let mut quantization = Quantization {
        groups: Vec::new(),
        ignore: Target::list(&format!("{name}.ignore"), config.get("ignore"))?,
        block: None,
        modules: BTreeMap::new(),
    };
    for (key, group) in groups {
        let activations = ["input_activations", "output_activations"];
        for key in activations
            .iter()
            .filter(|key| group.get(**key).is_some_and(set))
        {
            tracing::warn!("{name}: {key} are not quantised here, only weights are");
        }
        let field = format!("{name}.config_groups.{key}");
        let targets = Target::list(&format!("{field}.targets"), group.get("targets"))?;
        if let Some(Value::Object(weights)) = group.get("weights") {
            let (group, block) = weights_of(&format!("{field}.weights"), targets, weights)?;
            quantization.groups.push(group);
            quantization.block = quantization.block.or(block);
        }
    }
    Ok(quantization)
}

/// How the weights of a group are stored, and the size of blocks that share a scale.
fn weights_of(
    at: &str,
    targets: Vec<Target>,
    weights: &Map<String, Value>,
) -> Result<(Group, Option<[usize; 2]>), ConfigError> {
    let field = |of: &str| format!("{at}.{of}");
    let value = |of: &str| weights.get(of).unwrap_or(&Value::Null);
    let float = match value("type").as_str() {
        Some("float") => true,
        Some("int") => false,
        _ => {
            let expected = "\"int\" or \"float\"";
            return Err(wrong(&field("type"), expected, value("type")));
        }
    };
    let block = value("block_structure").as_array();
    let block = block.map(|size| pair(&field("block_structure"), size));
    // -1 means a scale a row.
    let size =
        Some(value("group_size")).filter(|size| !size.is_null() && size.as_i64() != Some(-1));
    let size = size.map(|size| whole(&field("group_size"), size, 1 << 20));
    let group = Group {
        targets,
        bits: whole(&field("num_bits"), value("num_bits"), 32)?,
        float: Some(float),
        symmetric: value("symmetric").as_bool(),
        group: size.transpose()?,
    };
    Ok((group, block.transpose()?.flatten()))
}

/// DeepSeek's files. Which modules are left as they are is not held against the weights: the names in its list are of several
/// kinds.
fn fp8(name: &str, config: &Map<String, Value>) -> Result<Quantization, ConfigError> {
    if let Some(format) = config.get("fmt").filter(|format| **format != "e4m3") {
        return Err(ConfigError::Unsupported {
            field: format!("{name}.fmt"),
            expected: "\"e4m3\"",
            found: show(format),
        });
    }
    let size = config.get("weight_block_size").and_then(Value::as_array);
    let block = size
        .map(|size| pair(&format!("{name}.weight_block_size"), size))
        .transpose()?;
    Ok(of_everything(8, Some(true), None, block.flatten()))
}

fn modelopt(name: &str, config: &Map<String, Value>) -> Result<Quantization, ConfigError> {
    let algorithm = config.get("quant_algo").unwrap_or(&Value::Null);
    match algorithm.as_str() {
        Some("NVFP4") => Ok(of_everything(4, Some(true), Some(16), None)),
        Some("FP8") => Ok(of_everything(8, Some(true), None, None)),
        _ => Err(ConfigError::Unsupported {
            field: format!("{name}.quant_algo"),
            expected: "\"NVFP4\" or \"FP8\"",
            found: show(algorithm),
        }),
    }
}

/// What MLX calls a module: experts are stacked, and all that is in a layer's feed-forward part is `mlp`
/// (`mlx_lm/models/kimi_linear.py`).
fn mlx_name(module: &str) -> String {
    let Some((layer, rest)) = module.split_once(".block_sparse_moe.") else {
        return module.to_owned();
    };
    let expert = rest.strip_prefix("experts.");
    let projection = expert.and_then(|rest| match rest.split_once('.')?.1 {
        "w1" => Some("gate_proj"),
        "w3" => Some("up_proj"),
        "w2" => Some("down_proj"),
        _ => None,
    });
    match projection {
        Some(projection) => format!("{layer}.mlp.switch_mlp.{projection}"),
        None => format!("{layer}.mlp.{rest}"),
    }
}

/// MLX: one scheme, and others for single modules.
fn mlx(name: &str, config: &Map<String, Value>) -> Result<Quantization, ConfigError> {
    let scheme_of = |at: &str, scheme: &Map<String, Value>| {
        let number = |key: &str, most| {
            whole(
                &format!("{at}.{key}"),
                scheme.get(key).unwrap_or(&Value::Null),
                most,
            )
        };
        let (bits, group) = (number("bits", 8)?, number("group_size", 1 << 20)?);
        let float = match scheme.get("mode").map(|mode| mode.as_str()) {
            None | Some(Some("affine")) => false,
            Some(Some("mxfp4" | "mxfp8" | "nvfp4")) => true,
            Some(_) => {
                return Err(ConfigError::Unsupported {
                    field: format!("{at}.mode"),
                    expected: "\"affine\", \"mxfp4\", \"mxfp8\" or \"nvfp4\"",
                    found: show(&scheme["mode"]),
                });
            }
        };
        Ok(of_everything(bits, Some(float), Some(group), None))
    };
    let mut quantization = scheme_of(name, config)?;
    for (module, scheme) in config {
        match scheme {
            Value::Object(scheme) => {
                let own = scheme_of(&format!("{name}.{module}"), scheme)?.groups.pop();
                quantization.modules.insert(module.clone(), own);
            }
            Value::Bool(false) => {
                quantization.modules.insert(module.clone(), None);
            }
            Value::Bool(true) | Value::Number(_) | Value::String(_) | Value::Null => {}
            Value::Array(_) => {
                return Err(ConfigError::Invalid {
                    field: format!("{name}.{module}"),
                    expected: "an object or false".to_owned(),
                    found: kind(scheme).to_owned(),
                });
            }
        }
    }
    Ok(quantization)
}

/// One group for every module.
fn of_everything(
    bits: usize,
    float: Option<bool>,
    group: Option<usize>,
    block: Option<[usize; 2]>,
) -> Quantization {
    let targets = ["Linear", "Embedding"].map(|class| Target::Named(class.to_owned()));
    Quantization {
        groups: vec![Group {
            targets: targets.into(),
            bits,
            float,
            symmetric: None,
            group,
        }],
        ignore: Vec::new(),
        block,
        modules: BTreeMap::new(),
    }
}

/// Two sizes.
fn pair(field: &str, list: &[Value]) -> Result<Option<[usize; 2]>, ConfigError> {
    let sizes = list.iter().map(|size| whole(field, size, 1 << 20));
    let sizes = sizes.collect::<Result<Vec<_>, _>>()?;
    match sizes[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok(Some([rows, columns])),
        _ => Err(ConfigError::Invalid {
            field: field.to_owned(),
            expected: "two sizes of at least 1".to_owned(),
            found: format!("{sizes:?}"),
        }),
    }
}
