//! Settings that are stored between runs, apart from chats and the layout of the panels.

use std::path::PathBuf;

use kimi_linear::backend::BackendKind;
use kimi_linear::engine::Sampling;
use serde::{Deserialize, Serialize};

/// A backend, with the command line's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(not(target_arch = "wasm32"), derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    /// A GPU if there is one, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// Any GPU, through Vulkan, Metal or DX12.
    Wgpu,
    /// An NVIDIA GPU of compute capability 9.0 (Hopper) or newer, through CUDA.
    Cuda,
}

impl BackendName {
    /// The library's name for it.
    #[must_use]
    pub fn kind(self) -> BackendKind {
        match self {
            Self::Auto => BackendKind::Auto,
            Self::Cpu => BackendKind::Cpu,
            Self::Wgpu => BackendKind::Wgpu,
            Self::Cuda => BackendKind::Cuda,
        }
    }

    /// The backend of a device.
    #[must_use]
    pub fn of(backend: &str) -> Self {
        match backend {
            "cpu" => Self::Cpu,
            "wgpu" => Self::Wgpu,
            "cuda" => Self::Cuda,
            _ => Self::Auto,
        }
    }
}

/// The model, and the device to run it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelChoice {
    /// The model's folder; `None` for the demo model.
    pub folder: Option<PathBuf>,
    /// The backend.
    pub backend: BackendName,
    /// The device's number; `None` for the best.
    pub device: Option<usize>,
    /// Maximum tokens of a conversation.
    pub context: usize,
}

impl Default for ModelChoice {
    fn default() -> Self {
        Self {
            folder: None,
            backend: BackendName::Auto,
            device: None,
            context: 32_768,
        }
    }
}

/// The sampling parameters of the sampling window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingChoice {
    /// Temperature; 0 is greedy.
    pub temperature: f64,
    /// 0 turns this off.
    pub top_k: usize,
    /// 1 turns this off.
    pub top_p: f64,
    /// 0 turns this off.
    pub min_p: f64,
    /// 1 turns this off.
    pub repetition_penalty: f64,
    /// 0 turns this off.
    pub presence_penalty: f64,
    /// 0 turns this off.
    pub frequency_penalty: f64,
    /// Random seed; `None` for a new one each time.
    pub seed: Option<u64>,
    /// Maximum tokens per answer.
    pub max_tokens: usize,
}

impl Default for SamplingChoice {
    fn default() -> Self {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = Sampling::GREEDY;
        Self {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed: None,
            max_tokens: 2048,
        }
    }
}

impl SamplingChoice {
    /// The engine's parameters; `fresh` is the seed if none is set.
    #[must_use]
    pub fn sampling(&self, fresh: u64) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
            seed: self.seed.unwrap_or(fresh),
        }
    }
}

/// Sampling parameters and a system prompt, under a name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Preset {
    /// Its name.
    pub name: String,
    /// Its sampling parameters.
    pub sampling: SamplingChoice,
    /// Its system prompt; `None` to leave the present one.
    pub system: Option<String>,
}

impl Preset {
    /// The presets that are always there.
    #[must_use]
    pub fn built_in() -> [Self; 3] {
        let of = |name: &str, temperature: f64, top_p: f64| Self {
            name: name.to_owned(),
            sampling: SamplingChoice {
                temperature,
                top_p,
                ..SamplingChoice::default()
            },
            system: None,
        };
        [
            of("Greedy", 0.0, 1.0),
            of("Balanced", 0.7, 0.95),
            of("Creative", 1.0, 0.95),
        ]
    }
}

impl Settings {
    /// Applies a preset. The seed and the maximum length of answers stay.
    pub fn apply(&mut self, preset: &Preset) {
        self.sampling = SamplingChoice {
            seed: self.sampling.seed,
            max_tokens: self.sampling.max_tokens,
            ..preset.sampling.clone()
        };
        if let Some(system) = &preset.system {
            self.system.clone_from(system);
        }
    }

    /// The name of the preset whose parameters are set; `None` for others.
    #[must_use]
    pub fn preset(&self) -> Option<String> {
        let is_set = |preset: &Preset| {
            let sampling = SamplingChoice {
                seed: self.sampling.seed,
                max_tokens: self.sampling.max_tokens,
                ..preset.sampling.clone()
            };
            let system = preset.system.as_ref();
            sampling == self.sampling && system.is_none_or(|system| *system == self.system)
        };
        let mut all = self.presets.iter().cloned().chain(Preset::built_in());
        all.find(is_set).map(|preset| preset.name)
    }
}

/// All settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The model.
    pub model: ModelChoice,
    /// Folders and files of the models that ran last, the last one first.
    pub recent: Vec<PathBuf>,
    /// The sampling.
    pub sampling: SamplingChoice,
    /// The user's presets.
    pub presets: Vec<Preset>,
    /// Whether the model's state of each chat is kept too.
    pub keep_state: bool,
    /// The system prompt of new chats.
    pub system: String,
    /// Whether tokens are traced for the views.
    pub trace: bool,
    /// Number of prompt tokens to trace, counted from its end.
    pub traced_prompt: usize,
    /// Dark or light; `None` for the system's setting.
    pub dark: Option<bool>,
    /// Whether the list of chats is shown.
    pub sidebar: bool,
    /// Whether the log is shown.
    pub log: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: ModelChoice::default(),
            recent: Vec::new(),
            sampling: SamplingChoice::default(),
            presets: Vec::new(),
            keep_state: false,
            system: String::new(),
            trace: true,
            traced_prompt: 256,
            dark: None,
            sidebar: true,
            log: false,
        }
    }
}
