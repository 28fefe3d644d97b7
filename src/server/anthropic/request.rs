//! The body of a request of Anthropic's Messages API, as types. Other fields of a block, tool or message (`cache_control`,
//! `citations`, `signature`, ...) do not change the answer and are ignored.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::fields::Whole;
use super::super::text_or::TextOr;

/// The fields of a request that are not common to all protocols (as `model`, `temperature`, `top_p`, `top_k`, `stream` are).
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicMessages")]
pub(in crate::server) struct MessagesRequest {
    /// Maximum number of tokens in the answer.
    #[schemars(required)]
    pub(super) max_tokens: Option<Whole>,
    /// The conversation.
    #[schemars(required)]
    pub(super) messages: Option<Vec<Message>>,
    /// The system prompt.
    pub(super) system: Option<TextOr<TextBlock>>,
    /// The tools that the model may call.
    pub(super) tools: Option<Vec<Tool>>,
    /// Whether the model calls tools.
    pub(super) tool_choice: Option<ToolChoice>,
    /// Stop strings.
    pub(super) stop_sequences: Option<Vec<String>>,
    /// Accepted without effect: whether the model thinks is the chat template's decision.
    #[serde(rename = "thinking")]
    pub(super) _thinking: Option<Thinking>,
    /// The format of the answer.
    pub(super) output_config: Option<OutputConfig>,
    /// Accepted without effect: there is one service tier.
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

/// A text of the system prompt, or of a tool result.
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
    /// Thinking of the model before an earlier answer.
    Thinking {
        thinking: String,
    },
    /// The same, encrypted; it cannot be decrypted here and is left out of the prompt.
    RedactedThinking,
    /// A tool call of the model.
    ToolUse {
        id: String,
        name: String,
        input: Map<String, Value>,
    },
    /// The result of a tool call.
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

/// A tool that the client runs.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicTool")]
pub(super) struct Tool {
    /// `custom` or absent; tools that Anthropic runs are not supported.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) description: Option<String>,
    /// The JSON schema of its arguments.
    pub(super) input_schema: Option<Map<String, Value>>,
    /// Whether the arguments are always constrained by the schema.
    pub(super) strict: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicToolChoice")]
pub(super) enum ToolChoice {
    /// The model decides.
    Auto {
        disable_parallel_tool_use: Option<bool>,
    },
    /// The model calls at least one tool.
    Any {
        disable_parallel_tool_use: Option<bool>,
    },
    /// The model calls this tool.
    Tool {
        name: String,
        disable_parallel_tool_use: Option<bool>,
    },
    /// The model calls no tool.
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
    /// Accepted without effect: the effort of thinking.
    #[serde(rename = "effort")]
    pub(super) _effort: Option<String>,
    pub(super) format: Option<OutputFormat>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicOutputFormat")]
pub(super) enum OutputFormat {
    /// JSON that follows a schema.
    JsonSchema { schema: Map<String, Value> },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "AnthropicServiceTier")]
pub(super) enum ServiceTier {
    Auto,
    StandardOnly,
}
