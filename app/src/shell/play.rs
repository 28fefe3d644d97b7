//! Runs a script: in each frame, the current step.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use eframe::egui;

use super::App;
use super::action::Action;
use serde_json::{Value, json};

use crate::chat::{Stage, Turn};
use crate::history::{History, TokenText};
use crate::script::{Player, Step, Until};
use crate::views::Wish;
use kimi_linear::engine::UndoWrite;
use kimi_linear::model::TraceHead;

/// Number of frames before a screenshot, for layouts to settle and animations to end.
const SETTLE: usize = 12;

/// Interval at which a script that waits for the clock checks it.
const LOOK: Duration = Duration::from_millis(100);

/// Interval at which a script that waits for anything else checks for its timeout; what it waits for arrives as an update.
const PATIENCE: Duration = Duration::from_secs(1);

impl App {
    pub(super) fn play(&mut self, ctx: &egui::Context) {
        let Some(mut player) = self.script.take() else {
            return;
        };
        if let Some((step, elapsed, frames)) = player.current() {
            // A waiting window is drawn when there is an update, as for a user.
            match step {
                Step::Wait(Until::Seconds(_)) => ctx.request_repaint_after(LOOK),
                Step::Wait(_) => ctx.request_repaint_after(PATIENCE),
                _ => ctx.request_repaint(),
            }
            if player.late(elapsed) {
                player.end(Err(format!("{step:?} did not come to its end")));
                ctx.send_viewport_cmd(egui::ViewportCommand::Close);
            } else {
                match self.step(ctx, &mut player, &step, elapsed, frames) {
                    Ok(true) => player.next(),
                    Ok(false) => {}
                    Err(reason) => {
                        player.end(Err(reason));
                        ctx.send_viewport_cmd(egui::ViewportCommand::Close);
                    }
                }
            }
        }
        self.script = Some(player);
    }

    /// Executes a step, or a part of it; returns whether it is done.
    fn step(
        &mut self,
        ctx: &egui::Context,
        player: &mut Player,
        step: &Step,
        elapsed: Duration,
        frames: usize,
    ) -> Result<bool, String> {
        match step {
            Step::Size(width, height) => {
                let size = egui::vec2(*width, *height);
                ctx.send_viewport_cmd(egui::ViewportCommand::InnerSize(size));
            }
            Step::Theme(dark) => self.settings.dark = Some(*dark),
            Step::Wait(until) => return self.waited(*until, elapsed),
            Step::Say(text) => return self.say(ctx, text, frames),
            Step::Try(at) => self.act(ctx, Action::Try(*at)),
            Step::Stop => self.act(ctx, Action::Stop),
            Step::Regenerate => self.act(ctx, Action::Regenerate),
            Step::New => self.act(ctx, Action::NewChat),
            Step::View(name) => self.act(ctx, Action::View(name.clone())),
            Step::Panels(all) => {
                let action = if *all {
                    Action::Spread
                } else {
                    Action::Arrange
                };
                self.act(ctx, action);
            }
            Step::Token(token) => self.selection.token = *token,
            Step::Find(text) => self.selection.token = Some(self.find(text)?),
            Step::Kda(layer, head) => {
                let (layer, head) = (*layer, *head);
                self.selection.kda = Some(TraceHead { layer, head });
                self.follows = false;
            }
            Step::Mla(layer, head) => {
                let (layer, head) = (*layer, *head);
                self.selection.mla = Some(TraceHead { layer, head });
            }
            Step::Trace(on) => self.settings.trace = *on,
            Step::Undo(every) => self.undo(ctx, *every)?,
            Step::Window(window) => self.act(ctx, Action::Toggle(*window)),
            Step::Shot(file) => {
                if frames < SETTLE {
                    return Ok(false);
                }
                let Some(image) = player.screenshot(ctx) else {
                    return Ok(false);
                };
                let path = player.out.join(file);
                save(&image, &path).map_err(|error| format!("{}: {error}", path.display()))?;
                tracing::info!("saved {}", path.display());
            }
            Step::Dump(file) => {
                let path = player.out.join(file);
                let written = serde_json::to_vec_pretty(&self.dump())
                    .map_err(std::io::Error::other)
                    .and_then(|bytes| std::fs::write(&path, bytes));
                written.map_err(|error| format!("{}: {error}", path.display()))?;
            }
            Step::Rate(name) => {
                let answer = self.chat().measures.answers.last();
                let rate = answer
                    .and_then(|answer| answer.rate(usize::MAX))
                    .unwrap_or_default();
                add_line(&player.out.join("rates.txt"), &format!("{name} {rate:.2}"))?;
            }
            Step::Frames(name) => {
                let frames = std::mem::take(&mut self.frames);
                add_line(&player.out.join("frames.txt"), &format!("{name}: {frames}"))?;
            }
            Step::Quit => {
                player.end(Ok(()));
                ctx.send_viewport_cmd(egui::ViewportCommand::Close);
            }
        }
        Ok(true)
    }

    /// Types a few letters of a message per frame, and sends it with the last; whether it was sent.
    fn say(&mut self, ctx: &egui::Context, text: &str, frames: usize) -> Result<bool, String> {
        if self.chat().busy() {
            return Err(format!("`say {text}`: an answer is under way: wait for it"));
        }
        let typed: String = text.chars().take(frames * 3).collect();
        let whole = typed.len() == text.len();
        self.chat_mut().draft = typed;
        if whole {
            self.act(ctx, Action::Send);
        }
        Ok(whole)
    }

    /// The position of the last token of a question that is this text.
    fn find(&self, text: &str) -> Result<usize, String> {
        let tokens = self.chat().history.tokens();
        let reads = |token: &TokenText| !token.answer && token.text.trim() == text;
        let found = tokens.iter().rposition(reads);
        found.ok_or_else(|| format!("no token reads `{text}`"))
    }

    /// Undoes the selected token's write of the selected head, or of every head.
    fn undo(&mut self, ctx: &egui::Context, every: bool) -> Result<(), String> {
        let token = self.chat().history.shown(self.selection.token);
        let token = token.ok_or("`undo`: there are no tokens")?;
        let head = self.selection.kda.filter(|_| !every);
        self.act(ctx, Action::Wish(Wish::Undo(UndoWrite { token, head })));
        match self.chat().history.undone() {
            Some(_) => Ok(()),
            None => Err(format!("`undo`: token {token} is not in the last question")),
        }
    }

    /// The content of the chat and of the selected KDA head, for tests.
    fn dump(&self) -> Value {
        let chat = self.chat();
        let turn = |turn: &Turn| json!({ "question": turn.question, "answer": turn.answer, "footer": turn.footer });
        let turns: Vec<Value> = chat.turns.iter().map(turn).collect();
        let tokens = chat.history.tokens().iter().enumerate();
        let tokens: Vec<Value> = tokens
            .map(|(position, token)| {
                let mut told = json!({ "text": token.text, "answer": token.answer });
                if let Some(head) = self.selection.kda {
                    numbers(&chat.history, position, head, &mut told);
                }
                told
            })
            .collect();
        let undone = chat
            .history
            .undone()
            .and_then(|undone| undone.answers.clone());
        let undone = undone.and_then(Result::ok);
        json!({ "turns": turns, "tokens": tokens, "undone": undone })
    }

    fn waited(&self, until: Until, elapsed: Duration) -> Result<bool, String> {
        if let Some(problem) = self.problem() {
            return Err(problem.sentence.clone());
        }
        let chat = self.chat();
        let problem = chat.turns.last().and_then(|turn| turn.problem.as_ref());
        if let (Some(problem), false) = (problem, chat.busy()) {
            return Err(problem.sentence.clone());
        }
        Ok(match until {
            Until::Ready => self.ready().is_ok(),
            Until::Answer => !chat.busy(),
            Until::Tokens(count) => {
                let intervals = chat
                    .measures
                    .answers
                    .last()
                    .map_or(0, |answer| answer.intervals.len());
                intervals + 1 >= count || chat.stage == Stage::Idle
            }
            Until::Traced => self.settled(),
            Until::Undone => {
                let undone = chat.history.undone();
                undone.is_some_and(|undone| undone.answers.is_some())
            }
            Until::Seconds(seconds) => elapsed.as_secs_f64() >= seconds,
        })
    }
}

/// Adds a line to a file.
fn add_line(path: &Path, line: &str) -> Result<(), String> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.create(true).append(true).open(path);
    let written = file.and_then(|mut file| writeln!(file, "{line}"));
    written.map_err(|error| format!("{}: {error}", path.display()))
}

/// A head's statistics at a token, and the distance of its state from the decayed previous one.
fn numbers(history: &History, position: usize, head: TraceHead, told: &mut Value) {
    let Some(frame) = history.frame(position) else {
        return;
    };
    let layer = frame.kda.iter().find(|layer| layer.layer == head.layer);
    if let Some(numbers) = layer.and_then(|layer| layer.heads.get(head.head)) {
        told["state"] = json!(numbers.state);
        told["write"] = json!(numbers.write);
        told["error"] = json!(numbers.error);
    }
    if let (Some(after), Some(before)) =
        (history.head(position, head), history.before(position, head))
    {
        let rows = after
            .state
            .chunks(after.width.max(1))
            .zip(before.chunks(after.width.max(1)));
        let changes = rows.zip(&after.decay).flat_map(|((after, before), decay)| {
            let pairs = after.iter().zip(before);
            pairs.map(move |(after, before)| {
                f64::from(*after) - f64::from(*decay) * f64::from(*before)
            })
        });
        let change = changes.map(|change| change * change).sum::<f64>().sqrt();
        told["change"] = json!(change);
    }
}

fn save(image: &egui::ColorImage, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::create_dir_all(folder)?;
    }
    let [width, height] = image.size.map(|side| side as u32);
    let bytes = image.pixels.iter().flat_map(|pixel| {
        let [red, green, blue, _] = pixel.to_array();
        [red, green, blue]
    });
    let picture = image::RgbImage::from_raw(width, height, bytes.collect())
        .ok_or("the screenshot is not as large as it says")?;
    picture.save(path)?;
    Ok(())
}
