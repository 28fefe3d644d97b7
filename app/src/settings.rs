//! What is kept between runs, apart from chats and the arrangement of the panels.

use std::path::PathBuf;

use kimi_linear::backend::BackendKind;
use kimi_linear::engine::Sampling;
use serde::{Deserialize, Serialize};

/// A backend by the name that the command line has for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    /// A GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// Any GPU, through Vulkan, Metal or DX12.
    Wgpu,
    /// An NVIDIA GPU, through CUDA.
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

    /// The one that a device of the library belongs to.
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

/// Which model to run, and on what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelChoice {
    /// The model's folder; `None` is the demo model.
    pub folder: Option<PathBuf>,
    /// The backend.
    pub backend: BackendName,
    /// The device's number; `None` is the best.
    pub device: Option<usize>,
    /// Tokens that a conversation may reach.
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

/// How answers are drawn, as the sampling panel sets it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingChoice {
    /// Divides the logits; 0 is greedy.
    pub temperature: f64,
    /// 0 is all.
    pub top_k: usize,
    /// 1 is all.
    pub top_p: f64,
    /// 0 is all.
    pub min_p: f64,
    /// 1 is none.
    pub repetition_penalty: f64,
    /// 0 is none.
    pub presence_penalty: f64,
    /// 0 is none.
    pub frequency_penalty: f64,
    /// Random seed; `None` is another one each time.
    pub seed: Option<u64>,
    /// The most tokens of one answer.
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
    /// The engine's form of it; `fresh` seeds where no seed is set.
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

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The model.
    pub model: ModelChoice,
    /// The sampling.
    pub sampling: SamplingChoice,
    /// What new chats tell the model first.
    pub system: String,
    /// Whether the views are fed.
    pub trace: bool,
    /// Tokens of a prompt that are traced, counted from its end.
    pub traced_prompt: usize,
    /// Dark or light; `None` is what the system says.
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
            sampling: SamplingChoice::default(),
            system: String::new(),
            trace: true,
            traced_prompt: 256,
            dark: None,
            sidebar: true,
            log: false,
        }
    }
}
