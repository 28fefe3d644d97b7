//! Scripts that type a conversation and save screenshots, one step per line; `docs/app.md` lists the steps.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use eframe::egui;
use web_time::{Duration, Instant};

use crate::shell::action::Window;
use crate::try_these::EXAMPLES;
use crate::views;

/// Timeout of a step.
const PATIENCE: Duration = Duration::from_secs(300);

/// A condition to wait for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// A model or a server is ready.
    Ready,
    /// The end of the answer.
    Answer,
    /// Number of tokens of the answer in progress.
    Tokens(usize),
    /// The selected heads' frames.
    Traced,
    /// The answers with and without a write.
    Undone,
    /// A number of seconds.
    Seconds(f64),
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The window's size, in points.
    Size(f32, f32),
    /// Dark or light.
    Theme(bool),
    /// Wait.
    Wait(Until),
    /// Type a question, and send it.
    Say(String),
    /// Send an example.
    Try(usize),
    /// Stop the answer.
    Stop,
    /// Answer the last question again.
    Regenerate,
    /// Start a chat.
    New,
    /// Bring a view to the front.
    View(String),
    /// Show all panels side by side, or the initial layout.
    Panels(bool),
    /// Select a token by its position; `None` is the newest.
    Token(Option<usize>),
    /// Select the last token of the questions with this text.
    Find(String),
    /// Select a KDA head.
    Kda(usize, usize),
    /// Select an MLA head.
    Mla(usize, usize),
    /// Turn tracing on or off.
    Trace(bool),
    /// Answer again without the selected token's write: in every head, or in the selected one.
    Undo(bool),
    /// Open or close a window.
    Window(Window),
    /// Save a screenshot.
    Shot(PathBuf),
    /// Save the turns, and the tokens with the selected head's numbers.
    Dump(PathBuf),
    /// Append the last answer's tokens per second to `rates.txt`, under a name.
    Rate(String),
    /// Append frame times since the last such step to `frames.txt`, under a name.
    Frames(String),
    /// Quit.
    Quit,
}

/// Parses a script.
///
/// # Errors
/// The first invalid line, with its number.
pub fn parse(text: &str) -> Result<Vec<Step>, String> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.trim().starts_with('#'));
    let step = |(at, line): (usize, &str)| {
        let line = line.trim();
        step(line).map_err(|reason| format!("line {}: `{line}`: {reason}", at + 1))
    };
    lines.map(step).collect()
}

fn step(line: &str) -> Result<Step, String> {
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let number = |text: &str| -> Result<usize, String> {
        text.parse().map_err(|_| format!("`{text}` is no number"))
    };
    let two = || -> Result<(usize, usize), String> {
        let (a, b) = rest
            .split_once(char::is_whitespace)
            .ok_or("two numbers are expected")?;
        Ok((number(a)?, number(b.trim())?))
    };
    let text = || match rest {
        "" => Err("a text is expected".to_owned()),
        text => Ok(text.to_owned()),
    };
    let bare = |step: Step| match rest {
        "" => Ok(step),
        _ => Err(format!("nothing is expected after {word}")),
    };
    let one_of = |choices: &[(&str, Step)]| {
        let found = choices.iter().find(|(name, _)| *name == rest);
        found.map(|(_, step)| step.clone()).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            format!("{} is expected", names.join(" or "))
        })
    };
    match word {
        "size" => two().map(|(width, height)| Step::Size(width as f32, height as f32)),
        "theme" => one_of(&[("dark", Step::Theme(true)), ("light", Step::Theme(false))]),
        "wait" => wait(rest).map(Step::Wait),
        "say" => text().map(Step::Say),
        "try" => EXAMPLES
            .iter()
            .position(|example| example.name == rest)
            .map(Step::Try)
            .ok_or_else(|| {
                format!(
                    "the examples are {:?}",
                    EXAMPLES.map(|example| example.name)
                )
            }),
        "stop" => bare(Step::Stop),
        "regenerate" => bare(Step::Regenerate),
        "new" => bare(Step::New),
        "view" => {
            let names: Vec<&str> = views::all().iter().map(|view| view.name()).collect();
            if names.contains(&rest) {
                Ok(Step::View(rest.to_owned()))
            } else {
                Err(format!("the views are {names:?}"))
            }
        }
        "panels" => one_of(&[("all", Step::Panels(true)), ("first", Step::Panels(false))]),
        "token" if rest == "newest" => Ok(Step::Token(None)),
        "token" => number(rest).map(|token| Step::Token(Some(token))),
        "find" => text().map(Step::Find),
        "kda" => two().map(|(layer, head)| Step::Kda(layer, head)),
        "mla" => two().map(|(layer, head)| Step::Mla(layer, head)),
        "trace" => one_of(&[("on", Step::Trace(true)), ("off", Step::Trace(false))]),
        "undo" if rest.is_empty() => Ok(Step::Undo(false)),
        "undo" => one_of(&[("all", Step::Undo(true))]),
        "window" => one_of(&[
            ("model", Step::Window(Window::Model)),
            ("sampling", Step::Window(Window::Sampling)),
            ("files", Step::Window(Window::Files)),
            ("help", Step::Window(Window::Help)),
            ("delta-rule", Step::Window(Window::DeltaRule)),
        ]),
        "shot" => text().map(|file| Step::Shot(PathBuf::from(file))),
        "dump" => text().map(|file| Step::Dump(PathBuf::from(file))),
        "rate" => text().map(Step::Rate),
        "frames" => text().map(Step::Frames),
        "quit" => bare(Step::Quit),
        _ => Err("there is no such step".to_owned()),
    }
}

fn wait(rest: &str) -> Result<Until, String> {
    match rest.split_once(char::is_whitespace) {
        Some(("tokens", count)) => match count.trim().parse() {
            Ok(count) => Ok(Until::Tokens(count)),
            Err(_) => Err(format!("`{count}` is no number of tokens")),
        },
        _ => match rest {
            "ready" => Ok(Until::Ready),
            "answer" => Ok(Until::Answer),
            "traced" => Ok(Until::Traced),
            "undone" => Ok(Until::Undone),
            _ => match rest.parse::<f64>() {
                Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(Until::Seconds(seconds)),
                _ => Err(
                    "ready, answer, traced, undone, tokens N or seconds are expected".to_owned(),
                ),
            },
        },
    }
}

/// The result of a script.
pub type Ending = Arc<Mutex<Option<Result<(), String>>>>;

/// A running script.
pub struct Player {
    steps: VecDeque<Step>,
    /// Where files are written.
    pub out: PathBuf,
    /// When the current step began, and frames since then.
    since: Option<(Instant, usize)>,
    image: Arc<Mutex<Option<Arc<egui::ColorImage>>>>,
    asked: bool,
    ending: Ending,
}

impl Player {
    /// A script, and the folder for its files.
    #[must_use]
    pub fn new(steps: Vec<Step>, out: &Path, ending: Ending) -> Self {
        Self {
            steps: steps.into(),
            out: out.to_owned(),
            since: None,
            image: Arc::default(),
            asked: false,
            ending,
        }
    }

    /// The current step, the time since it began, and the number of frames since.
    pub fn current(&mut self) -> Option<(Step, Duration, usize)> {
        let step = self.steps.front()?.clone();
        let (since, frames) = self.since.get_or_insert_with(|| (Instant::now(), 0));
        *frames += 1;
        Some((step, since.elapsed(), *frames))
    }

    /// Goes on to the next step.
    pub fn next(&mut self) {
        self.steps.pop_front();
        self.since = None;
        self.asked = false;
    }

    /// Whether the step has timed out.
    #[must_use]
    pub fn late(&self, elapsed: Duration) -> bool {
        elapsed > PATIENCE
    }

    /// Ends the script.
    pub fn end(&mut self, how: Result<(), String>) {
        self.steps.clear();
        *self.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
    }

    /// A screenshot of the window; `None` until it has been taken.
    pub fn screenshot(&mut self, ctx: &egui::Context) -> Option<Arc<egui::ColorImage>> {
        if !self.asked {
            self.asked = true;
            let image = Arc::clone(&self.image);
            let again = ctx.clone();
            let callback = egui::ScreenshotCallback::new(move |shot| {
                *image.lock().unwrap_or_else(PoisonError::into_inner) = Some(shot);
                again.request_repaint();
            });
            ctx.send_viewport_cmd(egui::ViewportCommand::Screenshot(callback));
        }
        self.image
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[cfg(test)]
mod tests {
    use super::{Step, Until, parse};

    #[test]
    fn a_script_is_a_step_a_line() {
        let text = "# a comment\n\nsize 1280 800\nwait ready\nsay What is 3?\nwait tokens 4\nwait 0.5\nkda 2 1\nshot a.png\nquit\n";
        let expected = [
            Step::Size(1280.0, 800.0),
            Step::Wait(Until::Ready),
            Step::Say("What is 3?".to_owned()),
            Step::Wait(Until::Tokens(4)),
            Step::Wait(Until::Seconds(0.5)),
            Step::Kda(2, 1),
            Step::Shot("a.png".into()),
            Step::Quit,
        ];
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn a_line_that_is_no_step_is_named() {
        for bad in [
            "dance",
            "wait long",
            "view Nothing",
            "kda 1",
            "theme blue",
            "quit now",
            "say",
            "wait -1",
        ] {
            let error = parse(&format!("wait ready\n{bad}")).unwrap_err();
            assert!(
                error.starts_with("line 2") && error.contains(bad),
                "{error}"
            );
        }
    }
}
