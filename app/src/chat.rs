//! A chat: what was said, what of it the model has as tokens, and how its answer comes along.
//!
//! It draws nothing. Updates of the session go in; the shell reads it.

use std::path::PathBuf;
use std::time::Instant;

use kimi_linear::engine::{FinishReason, Usage};
use kimi_linear::tokenizer::Conversation;

use crate::history::{History, TokenText};
use crate::markdown::Markdown;
use crate::measure::{AnswerMeasure, Measures};
use crate::problem::Problem;
use crate::session::{ChatId, ChatUpdate};

/// The title of a chat in which nothing has been said.
pub const NEW_TITLE: &str = "New chat";

/// One question and its answer.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// What was asked.
    pub question: String,
    /// The answer as it was written.
    pub answer: String,
    /// The same, to be drawn.
    pub markdown: Markdown,
    /// One line about it, once it has ended.
    pub footer: Option<String>,
    /// Why there is no answer.
    pub problem: Option<Problem>,
    /// Its height when it was drawn last, and the width that it had.
    pub drawn: Option<(f32, f32)>,
}

/// How far an answer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// There is none under way.
    #[default]
    Idle,
    /// It was asked for; others run before it.
    Waiting {
        /// How many.
        ahead: usize,
    },
    /// The prompt is being read.
    Reading {
        /// Number of tokens that have been computed.
        done: usize,
        /// Those of them that were cached.
        cached: usize,
        /// All of them.
        total: usize,
    },
    /// Tokens come.
    Answering,
}

/// A chat.
pub struct Chat {
    /// Its name in this run.
    pub id: ChatId,
    /// Its title in the list.
    pub title: String,
    /// What the model is told first; it counts until the first question.
    pub system: String,
    /// What was said and answered.
    pub turns: Vec<Turn>,
    /// What is being typed.
    pub draft: String,
    /// The turn whose question is being edited: sending takes the conversation back to it.
    pub editing: Option<usize>,
    /// How far the answer is.
    pub stage: Stage,
    /// Its tokens and frames.
    pub history: History,
    /// What its answers took.
    pub measures: Measures,
    /// The file it was saved to or opened from.
    pub file: Option<PathBuf>,
    /// What was said, as the model has it: all turns that were answered.
    pub conversation: Conversation,
    /// Tokens of the prompt and the answer under way.
    ids: Vec<u32>,
    prompt: usize,
    asked: Option<Instant>,
    last: Option<Instant>,
    traced: bool,
}

/// What an update asks of the chat's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Nothing,
    /// The answer has ended.
    Ended,
    /// Something to say.
    Notice(String),
    /// Something went wrong beside the answer.
    Problem(Problem),
}

impl Chat {
    /// An empty chat.
    #[must_use]
    pub fn new(id: ChatId, system: &str) -> Self {
        Self {
            id,
            title: NEW_TITLE.to_owned(),
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

    /// Whether an answer is under way.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.stage != Stage::Idle
    }

    /// Whether anything was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Begins a turn; the conversation so far is what the session is to be given with it.
    pub fn ask(&mut self, question: &str, traced: bool) -> Conversation {
        self.stage = Stage::Waiting { ahead: 0 };
        self.editing = None;
        self.traced = traced;
        // A turn that failed has no part in the conversation, and none on the screen once another is asked.
        self.turns.truncate(self.conversation.turns());
        if self.turns.is_empty() {
            self.title = title(question);
            self.conversation = Conversation::new(Some(&self.system));
        }
        self.turns.push(Turn {
            question: question.to_owned(),
            ..Turn::default()
        });
        self.measures.answers.push(AnswerMeasure {
            traced,
            ..AnswerMeasure::default()
        });
        self.ids.clear();
        self.prompt = 0;
        (self.asked, self.last) = (None, None);
        self.conversation.clone()
    }

    /// Goes back to before a turn, and gives its question.
    pub fn back_to(&mut self, turn: usize) -> Option<String> {
        let question = self.turns.get(turn)?.question.clone();
        self.turns.truncate(turn);
        self.conversation.truncate(turn);
        Some(question)
    }

    /// A model was loaded: nothing of this chat is in its memory. Frames are of the model that made them, and tokens of
    /// another one mean nothing to it.
    pub fn reread(&mut self, other: bool) {
        self.history = History::default();
        self.measures.context_used = 0;
        if std::mem::take(&mut self.stage) != Stage::Idle
            && let Some(turn) = self.turns.last_mut()
        {
            turn.footer = Some("stopped: a model was loaded".to_owned());
        }
        if other {
            self.conversation.forget_tokens();
        }
    }

    /// Takes what the session tells of this chat.
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
            ChatUpdate::Frame(frame) => self.history.push_frame(*frame),
            ChatUpdate::Ranks(ranks) => self.history.set_ranks(ranks),
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
                if let Some(answer) = self.measures.answers.last_mut() {
                    answer.finished = true;
                }
                match self.turns.last_mut() {
                    Some(turn) if turn.footer.is_none() => turn.problem = Some(problem),
                    _ => return Outcome::Problem(problem),
                }
                return Outcome::Ended;
            }
            ChatUpdate::Retraced => return Outcome::Nothing,
            ChatUpdate::Saved { path, tokens } => {
                let notice = match tokens {
                    0 => format!("Saved to {}", path.display()),
                    _ => format!(
                        "Saved to {}, with the memory of {tokens} tokens",
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
                    "Opened {turns} turns, with the memory of {remembered} tokens: nothing has to be read again"
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
            // It was stopped before it began: the question can be asked again, or another in its place.
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

/// One line about an answer.
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

/// A duration for people.
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
