//! The body of a request of Anthropic's Messages API, as types. What a block, tool or message has beside these fields
//! (`cache_control`, `citations`, `signature`, ...) is bookkeeping and is not read.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::fields::Whole;
use super::super::text_or::TextOr;

/// The fields of a request, beside those that all protocols share (`model`, `temperature`, `top_p`, `top_k`, `stream`).
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicMessages")]
pub(in crate::server) struct MessagesRequest {
    /// The most tokens of the answer.
    #[schemars(required)]
    pub(super) max_tokens: Option<Whole>,
    /// The conversation.
    #[schemars(required)]
    pub(super) messages: Option<Vec<Message>>,
    /// What the model is told before the conversation.
    pub(super) system: Option<TextOr<TextBlock>>,
    /// The tools that the model may call.
    pub(super) tools: Option<Vec<Tool>>,
    /// Whether it calls them.
    pub(super) tool_choice: Option<ToolChoice>,
    /// Texts that end the answer.
    pub(super) stop_sequences: Option<Vec<String>>,
    /// Whether the model thinks before it answers. This one does not; the answer has no thinking in it.
    #[serde(rename = "thinking")]
    pub(super) _thinking: Option<Thinking>,
    /// The form of the answer.
    pub(super) output_config: Option<OutputConfig>,
    /// There is one tier.
    #[serde(rename = "service_tier")]
    pub(super) _service_tier: Option<ServiceTier>,
}

/// One message.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicMessage")]
pub(super) struct Message {
    pub(super) role: Role,
    pub(super) content: TextOr<Block>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "AnthropicRole")]
pub(super) enum Role {
    User,
    Assistant,
    System,
}

/// A text of the system, or of a tool's result.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicTextBlock")]
pub(super) enum TextBlock {
    Text { text: String },
    Image,
    Document,
    SearchResult,
}

/// A block of a message.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicBlock")]
pub(super) enum Block {
    Text {
        text: String,
    },
    /// What the model thought before it answered.
    Thinking {
        thinking: String,
    },
    /// The same, encrypted: it cannot be read here and is left out.
    RedactedThinking,
    /// The model's call of a tool.
    ToolUse {
        id: String,
        name: String,
        input: Map<String, Value>,
    },
    /// What a call gave.
    ToolResult {
        tool_use_id: String,
        content: Option<TextOr<TextBlock>>,
        is_error: Option<bool>,
    },
    Image,
    Document,
    SearchResult,
    ServerToolUse,
    WebSearchToolResult,
    WebFetchToolResult,
    CodeExecutionToolResult,
    ContainerUpload,
}

/// A tool of the client's.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicTool")]
pub(super) struct Tool {
    /// `custom`, or nothing; tools that Anthropic runs are not there.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) description: Option<String>,
    /// The JSON schema of its arguments.
    pub(super) input_schema: Option<Map<String, Value>>,
    /// Whether arguments are always held to the schema.
    pub(super) strict: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicToolChoice")]
pub(super) enum ToolChoice {
    /// As the model likes.
    Auto {
        disable_parallel_tool_use: Option<bool>,
    },
    /// At least one tool is called.
    Any {
        disable_parallel_tool_use: Option<bool>,
    },
    /// This tool is called.
    Tool {
        name: String,
        disable_parallel_tool_use: Option<bool>,
    },
    /// No tool is called.
    None,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicThinking")]
pub(super) enum Thinking {
    Enabled {
        #[serde(rename = "budget_tokens")]
        _budget_tokens: Option<u64>,
    },
    Adaptive,
    Disabled,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicOutputConfig")]
pub(super) struct OutputConfig {
    /// How much the model thinks; there is one way to answer.
    #[serde(rename = "effort")]
    pub(super) _effort: Option<String>,
    pub(super) format: Option<OutputFormat>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicOutputFormat")]
pub(super) enum OutputFormat {
    /// JSON by a schema.
    JsonSchema { schema: Map<String, Value> },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "AnthropicServiceTier")]
pub(super) enum ServiceTier {
    Auto,
    StandardOnly,
}
