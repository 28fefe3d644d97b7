//! A chat: its turns, its tokens, and the progress of its answer.
//!
//! It draws nothing. It handles the session's updates, and the shell reads it.

use std::path::PathBuf;

use kimi_linear::engine::{FinishReason, Usage};
use kimi_linear::tokenizer::Conversation;
use web_time::Instant;

use crate::history::{History, TokenText};
use crate::kept::WrittenBy;
use crate::markdown::Markdown;
use crate::measure::{AnswerMeasure, Measures};
use crate::problem::Problem;
use crate::session::{ChatId, ChatUpdate};

/// The title of an empty chat.
pub const NEW_TITLE: &str = "New chat";

/// One question and its answer.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The question.
    pub question: String,
    /// The answer as text.
    pub answer: String,
    /// The answer as Markdown for drawing.
    pub markdown: Markdown,
    /// A summary line, once the answer has ended.
    pub footer: Option<String>,
    /// Why there is no answer.
    pub problem: Option<Problem>,
    /// The name of the model that wrote the answer.
    pub model: Option<String>,
    /// When the question was sent, in seconds since 1970.
    pub asked: Option<i64>,
    /// The width and height of the last drawing.
    pub drawn: Option<(f32, f32)>,
}

/// The progress of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// No answer is in progress.
    #[default]
    Idle,
    /// It is queued behind other requests.
    Waiting {
        /// Number of requests before it.
        ahead: usize,
    },
    /// The prompt is being read.
    Reading {
        /// Number of tokens that have been computed.
        done: usize,
        /// Prompt tokens that were cached.
        cached: usize,
        /// Number of prompt tokens.
        total: usize,
    },
    /// Tokens are generated.
    Answering,
}

/// A chat.
pub struct Chat {
    /// Its id in this run.
    pub id: ChatId,
    /// Its title in the list.
    pub title: String,
    /// Whether the user gave it this title.
    pub renamed: bool,
    /// The name of its file on disk; `None` until it is kept.
    pub key: Option<String>,
    /// The model that wrote its last answer.
    pub model: Option<WrittenBy>,
    /// When it last changed, in seconds since 1970.
    pub changed: i64,
    /// Whether it has changes that are not on disk.
    pub unsaved: bool,
    /// Whether the running model has read it, or its state was restored.
    pub remembered: bool,
    /// The system prompt; it can change until the first question.
    pub system: String,
    /// Its turns.
    pub turns: Vec<Turn>,
    /// The text in the input field.
    pub draft: String,
    /// The turn whose question is being edited: sending takes the conversation back to it.
    pub editing: Option<usize>,
    /// The progress of the answer.
    pub stage: Stage,
    /// Its tokens and frames.
    pub history: History,
    /// The timings of its answers.
    pub measures: Measures,
    /// The file it was saved to or opened from.
    pub file: Option<PathBuf>,
    /// The conversation as the model has it: all answered turns.
    pub conversation: Conversation,
    /// Number of tokens of the prompt and the answer in progress.
    ids: Vec<u32>,
    prompt: usize,
    asked: Option<Instant>,
    last: Option<Instant>,
    traced: bool,
}

/// What an update requires of the chat's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Nothing,
    /// The answer has ended.
    Ended,
    /// A notice to show.
    Notice(String),
    /// A problem apart from the answer.
    Problem(Problem),
}

impl Chat {
    /// An empty chat.
    #[must_use]
    pub fn new(id: ChatId, system: &str) -> Self {
        Self {
            id,
            title: NEW_TITLE.to_owned(),
            renamed: false,
            key: None,
            model: None,
            changed: 0,
            unsaved: false,
            remembered: false,
            system: system.to_owned(),
            turns: Vec::new(),
            draft: String::new(),
            editing: None,
            stage: Stage::Idle,
            history: History::default(),
            measures: Measures::default(),
            file: None,
            conversation: Conversation::default(),
            ids: Vec::new(),
            prompt: 0,
            asked: None,
            last: None,
            traced: false,
        }
    }

    /// Whether an answer is in progress.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.stage != Stage::Idle
    }

    /// Whether the chat is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Marks a change that is to be kept.
    pub fn touch(&mut self) {
        self.changed = chrono::Utc::now().timestamp();
        self.unsaved = true;
    }

    /// Gives it another title; an empty one is replaced by the first question.
    pub fn rename(&mut self, name: &str) {
        let name = name.trim();
        self.renamed = !name.is_empty();
        self.title = match self.turns.first() {
            _ if self.renamed => name.to_owned(),
            Some(turn) => title(&turn.question),
            None => NEW_TITLE.to_owned(),
        };
        self.unsaved = true;
    }

    /// Whether its title, a question or an answer has this text, in upper or lower case.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        let has = |part: &str| part.to_lowercase().contains(&text);
        has(&self.title)
            || self
                .turns
                .iter()
                .any(|turn| has(&turn.question) || has(&turn.answer))
    }

    /// Starts a turn that `model` will answer; returns the conversation so far, for the session.
    pub fn ask(&mut self, question: &str, traced: bool, model: Option<WrittenBy>) -> Conversation {
        self.touch();
        self.stage = Stage::Waiting { ahead: 0 };
        self.editing = None;
        self.traced = traced;
        // A failed turn is not part of the conversation, and is removed when another question is asked.
        self.turns.truncate(self.conversation.turns());
        if self.turns.is_empty() {
            if !self.renamed {
                self.title = title(question);
            }
            self.conversation = Conversation::new(Some(&self.system));
        }
        // Tokens of another model are meaningless to this one.
        if self.model != model {
            self.conversation.forget_tokens();
        }
        self.turns.push(Turn {
            question: question.to_owned(),
            model: model.as_ref().map(|model| model.name.clone()),
            asked: Some(self.changed),
            ..Turn::default()
        });
        self.model = model;
        self.measures.answers.push(AnswerMeasure {
            traced,
            ..AnswerMeasure::default()
        });
        self.ids.clear();
        self.prompt = 0;
        (self.asked, self.last) = (None, None);
        self.conversation.clone()
    }

    /// Removes a turn and all after it, and returns its question.
    pub fn back_to(&mut self, turn: usize) -> Option<String> {
        let question = self.turns.get(turn)?.question.clone();
        self.turns.truncate(turn);
        self.conversation.truncate(turn);
        self.touch();
        Some(question)
    }

    /// A model was loaded: it has no state of this chat, and frames belong to the model that made them.
    pub fn reread(&mut self) {
        self.history = History::default();
        self.measures.context_used = 0;
        self.remembered = false;
        self.end("stopped: a model was loaded");
    }

    /// Ends an answer in progress, whose session has gone; the part already written is kept.
    pub fn end(&mut self, reason: &str) {
        if !self.busy() {
            return;
        }
        self.finish(FinishReason::Cancelled, "", Usage::default());
        if let Some(turn) = self.turns.last_mut() {
            turn.footer = Some(reason.to_owned());
        }
    }

    /// Handles an update of this chat.
    pub fn take(&mut self, update: ChatUpdate) -> Outcome {
        match update {
            ChatUpdate::Queued { ahead } => self.stage = Stage::Waiting { ahead },
            ChatUpdate::Prompt { tokens, at } => self.begin(tokens, at),
            ChatUpdate::Prefill { done, cached } => {
                if let Some(answer) = self.measures.answers.last_mut() {
                    answer.cached_tokens = cached;
                }
                self.measures.context_used = done;
                let total = self.prompt;
                self.stage = Stage::Reading {
                    done,
                    cached,
                    total,
                };
            }
            ChatUpdate::Token { token, text, at } => self.token(token, &text, at),
            ChatUpdate::Tokens(tokens) => {
                self.measures.context_used = tokens.len();
                self.history.set_tokens(tokens);
            }
            ChatUpdate::Frame(frame) => self.history.push_frame(*frame),
            ChatUpdate::Likely { position, tokens } => self.history.set_likely(position, tokens),
            ChatUpdate::Ranks(ranks) => self.history.set_ranks(ranks),
            ChatUpdate::Scores(scores) => self.history.set_scores(scores),
            ChatUpdate::Undone(undone) => self.history.set_undone(undone),
            ChatUpdate::Finished {
                reason,
                text,
                usage,
            } => {
                self.finish(reason, &text, usage);
                return Outcome::Ended;
            }
            ChatUpdate::Failed(problem) => {
                self.stage = Stage::Idle;
                self.touch();
                if let Some(answer) = self.measures.answers.last_mut() {
                    answer.finished = true;
                }
                match self.turns.last_mut() {
                    Some(turn) if turn.footer.is_none() => turn.problem = Some(problem),
                    _ => return Outcome::Problem(problem),
                }
                return Outcome::Ended;
            }
            ChatUpdate::Retraced | ChatUpdate::Recalled => return Outcome::Nothing,
            ChatUpdate::Saved { path, tokens } => {
                let notice = match tokens {
                    0 => format!("Saved to {}", path.display()),
                    _ => format!(
                        "Saved to {}, with the state of {tokens} tokens",
                        path.display()
                    ),
                };
                self.file = Some(path);
                return Outcome::Notice(notice);
            }
            ChatUpdate::Opened {
                conversation,
                tokens,
                remembered,
                problem,
            } => {
                self.open(conversation, tokens);
                if let Some(problem) = problem {
                    return Outcome::Problem(problem);
                }
                let turns = self.turns.len();
                return Outcome::Notice(format!(
                    "Opened {turns} {}, with the state of {remembered} tokens",
                    if turns == 1 { "turn" } else { "turns" }
                ));
            }
            ChatUpdate::FileFailed(problem) | ChatUpdate::RetraceFailed(problem) => {
                return Outcome::Problem(problem);
            }
        }
        Outcome::Nothing
    }

    fn begin(&mut self, tokens: Vec<TokenText>, at: Instant) {
        self.ids = tokens.iter().map(|token| token.id).collect();
        self.prompt = tokens.len();
        self.asked = Some(at);
        self.stage = Stage::Reading {
            done: 0,
            cached: 0,
            total: self.prompt,
        };
        if let Some(answer) = self.measures.answers.last_mut() {
            answer.prompt_tokens = self.prompt;
        }
        self.history.set_tokens(tokens);
    }

    fn token(&mut self, token: TokenText, text: &str, at: Instant) {
        self.stage = Stage::Answering;
        if let (Some(answer), Some(asked)) = (self.measures.answers.last_mut(), self.asked) {
            match self.last {
                None => answer.first_token = Some((at - asked).as_secs_f64() * 1000.0),
                Some(last) => answer.intervals.push((at - last).as_secs_f32() * 1000.0),
            }
        }
        self.last = Some(at);
        if self.prompt > 0 {
            self.ids.push(token.id);
            self.measures.context_used = self.ids.len();
            self.history.push_token(token);
        }
        self.add(text);
    }

    fn add(&mut self, text: &str) {
        if let Some(turn) = self.turns.last_mut()
            && !text.is_empty()
        {
            turn.answer.push_str(text);
            turn.markdown.push(text);
            turn.drawn = None;
        }
    }

    fn finish(&mut self, reason: FinishReason, rest: &str, usage: Usage) {
        if !self.busy() {
            return;
        }
        self.add(rest);
        self.stage = Stage::Idle;
        self.touch();
        let Some(measure) = self.measures.answers.last_mut() else {
            return;
        };
        measure.finished = true;
        if usage.prompt_tokens > 0 {
            measure.prompt_tokens = usage.prompt_tokens;
            measure.cached_tokens = usage.cached_tokens;
            self.measures.context_used = usage.prompt_tokens + usage.generated_tokens;
        }
        let footer = footer(reason, measure);
        let Some(turn) = self.turns.last_mut() else {
            return;
        };
        turn.footer = Some(footer);
        turn.drawn = None;
        if reason == FinishReason::Cancelled && turn.answer.is_empty() {
            // It was stopped before its first token: the question can be asked again, or another instead.
            return;
        }
        let (question, answer) = (turn.question.clone(), turn.answer.clone());
        self.conversation.take(
            &question,
            &answer,
            std::mem::take(&mut self.ids),
            self.prompt,
        );
    }

    fn open(&mut self, conversation: Conversation, tokens: Vec<TokenText>) {
        let text = |at: usize| {
            conversation.messages()[at]["content"]
                .as_str()
                .unwrap_or_default()
        };
        let messages = conversation.messages();
        let role = |at: usize| messages[at]["role"].as_str().unwrap_or_default();
        self.turns.clear();
        for at in 0..messages.len() {
            match role(at) {
                "system" => self.system = text(at).to_owned(),
                "user" => self.turns.push(Turn {
                    question: text(at).to_owned(),
                    ..Turn::default()
                }),
                _ => {
                    if let Some(turn) = self.turns.last_mut() {
                        turn.answer = text(at).to_owned();
                        turn.markdown = Markdown::new(text(at));
                        turn.footer = Some("from the file".to_owned());
                    }
                }
            }
        }
        if let Some(turn) = self.turns.first() {
            self.title = title(&turn.question);
        }
        self.touch();
        self.measures.context_used = tokens.len();
        self.history.set_tokens(tokens);
        self.conversation = conversation;
        self.stage = Stage::Idle;
    }
}

/// The first words of a question.
fn title(question: &str) -> String {
    const MOST: usize = 28;
    let line = question.lines().next().unwrap_or_default().trim();
    if line.chars().count() <= MOST {
        return line.to_owned();
    }
    let cut: String = line.chars().take(MOST).collect();
    let end = cut
        .rfind(' ')
        .filter(|end| *end > MOST / 2)
        .unwrap_or(cut.len());
    format!("{}…", &cut[..end])
}

/// A summary line of an answer.
fn footer(reason: FinishReason, answer: &AnswerMeasure) -> String {
    let mut words = vec![format!(
        "{} tokens",
        answer.intervals.len() + usize::from(answer.first_token.is_some())
    )];
    if let Some(rate) = answer.rate(usize::MAX) {
        words.push(format!("{rate:.1} tokens/s"));
    }
    if let Some(first) = answer.first_token {
        words.push(format!("first after {}", milliseconds(first)));
    }
    if answer.cached_tokens > 0 {
        words.push(format!(
            "{} of {} read from the cache",
            answer.cached_tokens, answer.prompt_tokens
        ));
    }
    match reason {
        FinishReason::Stop => {}
        FinishReason::Length => words.push("cut at its limit".to_owned()),
        FinishReason::Cancelled => words.push("stopped".to_owned()),
    }
    words.join(" · ")
}

/// A duration for display.
#[must_use]
pub fn milliseconds(count: f64) -> String {
    if count < 10.0 {
        format!("{count:.1} ms")
    } else if count < 1000.0 {
        format!("{count:.0} ms")
    } else {
        format!("{:.1} s", count / 1000.0)
    }
}
