//! The body of a request of OpenAI's Responses API, as types. Other fields of an item, part or tool (`id`, `status`,
//! `annotations`, ...) do not change the answer and are ignored.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::fields::Whole;
use super::super::text_or::{TextOr, WordOr};
use super::super::tools::Mode;

/// The fields of a request that are not common to all protocols (as `model`, `temperature`, `top_p`, `stream` are).
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Responses")]
pub(in crate::server) struct ResponsesRequest {
    /// Maximum number of tokens in the answer.
    pub(super) max_output_tokens: Option<Whole>,
    /// The user's text, or items ([`Item`]); an item without a `type` is a message.
    #[schemars(with = "TextOr<Item>")]
    pub(super) input: Option<Value>,
    /// The system prompt. It is not carried over from the previous response.
    pub(super) instructions: Option<String>,
    /// The response that this one continues.
    pub(super) previous_response_id: Option<String>,
    /// Whether the response is stored, so that later requests can continue it.
    pub(super) store: Option<bool>,
    /// The functions that the model may call.
    pub(super) tools: Option<Vec<Tool>>,
    /// Whether the model calls them: a word, or a [`ToolChoice`].
    #[schemars(with = "Option<WordOr<ToolChoice>>")]
    pub(super) tool_choice: Option<Value>,
    /// Whether one answer may contain several calls.
    pub(super) parallel_tool_calls: Option<bool>,
    /// The format of the text.
    pub(super) text: Option<Text>,
    /// How the model thinks before it answers.
    pub(super) reasoning: Option<Reasoning>,
    /// Additional output.
    pub(super) include: Option<Vec<Include>>,
    /// Number of most likely tokens reported per token, if `include` asks for log-probabilities.
    pub(super) top_logprobs: Option<Whole>,
}

/// One item of the input.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseItem")]
pub(super) enum Item {
    Message {
        role: Role,
        content: TextOr<Part>,
    },
    /// A function call of the model.
    FunctionCall {
        call_id: String,
        name: String,
        arguments: String,
    },
    /// The result of a call.
    FunctionCallOutput {
        call_id: String,
        output: TextOr<Part>,
    },
    /// Thinking of the model before an earlier answer.
    Reasoning {
        content: Option<Vec<Part>>,
    },
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ResponseRole")]
pub(super) enum Role {
    User,
    Assistant,
    System,
    Developer,
}

impl Role {
    /// The role in the format of templates.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::System | Self::Developer => "system",
        }
    }
}

/// A part of an item.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponsePart")]
pub(super) enum Part {
    InputText { text: String },
    OutputText { text: String },
    ReasoningText { text: String },
    Refusal { refusal: String },
    InputImage,
    InputFile,
    InputAudio,
}

/// A tool that the client runs; tools that OpenAI runs are not supported.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseTool")]
pub(super) enum Tool {
    Function {
        name: String,
        description: Option<String>,
        /// The JSON schema of its arguments.
        parameters: Option<Map<String, Value>>,
        /// Whether the arguments are always constrained by the schema.
        strict: Option<bool>,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseToolChoice")]
pub(super) enum ToolChoice {
    /// The model calls this function.
    Function { name: String },
    /// Only these may be called.
    AllowedTools { mode: Mode, tools: Vec<Named> },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseNamed")]
pub(super) enum Named {
    Function { name: String },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponseText")]
pub(super) struct Text {
    pub(super) format: Option<TextFormat>,
    /// Accepted without effect: the verbosity of the answer.
    #[serde(rename = "verbosity")]
    pub(super) _verbosity: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseTextFormat")]
pub(super) enum TextFormat {
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema {
        name: Option<String>,
        schema: Map<String, Value>,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponseReasoning")]
pub(super) struct Reasoning {
    /// The effort of thinking, passed to the template.
    pub(super) effort: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, JsonSchema)]
#[schemars(rename = "ResponseInclude")]
pub(super) enum Include {
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
    /// Encrypted thinking, which no answer has.
    #[serde(rename = "reasoning.encrypted_content")]
    EncryptedReasoning,
}
