//! Examples for the demo model, each with what to look at.

use kimi_linear::demo::SUGGESTIONS;

/// An example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Example {
    /// Its name, on its button.
    pub name: &'static str,
    /// The message that is sent.
    pub prompt: &'static str,
    /// What to look at, and in which view.
    pub look_at: &'static str,
    /// The view to bring to the front.
    pub view: &'static str,
    /// The KDA layer and head of the demo model that shows it.
    pub kda: [usize; 2],
    /// The text of the token to look at: the last one that reads so.
    pub token: &'static str,
    /// Whether that token is in the answer; otherwise it is in the question.
    pub in_answer: bool,
}

/// All examples, in the order of their buttons. `app/tests/memory.rs` holds each sentence to the trace.
pub const EXAMPLES: [Example; 4] = [
    Example {
        name: SUGGESTIONS[0].0,
        prompt: SUGGESTIONS[0].1,
        look_at: "At “3” this head reads what it holds for the red box (r, the 7), takes the error, and writes only the \
                  correction: its row changes from 7 to 3, and the blue box keeps its 2. Undo this write, and the answer is 7.",
        view: "State",
        kda: [2, 0],
        token: "3",
        in_answer: false,
    },
    Example {
        name: SUGGESTIONS[1].0,
        prompt: SUGGESTIONS[1].1,
        look_at: "Where Mary goes is one key of this head: at “garden” its row changes from kitchen to garden. Undo this write, \
                  and Mary has the apple in the kitchen.",
        view: "What it remembers",
        kda: [2, 0],
        token: "garden",
        in_answer: false,
    },
    Example {
        name: SUGGESTIONS[2].0,
        prompt: SUGGESTIONS[2].1,
        look_at: "Each push writes over the last word under one key of this head: apple, pear, cup. At “Pop” the row goes back to \
                  pear, of which a part was left. Select “pear” and undo its write: the answer is apple.",
        view: "What it remembers",
        kda: [2, 0],
        token: "Pop",
        in_answer: false,
    },
    Example {
        name: SUGGESTIONS[3].0,
        prompt: SUGGESTIONS[3].1,
        look_at: "At the answer's “:” and at each of its commas this head's output gate is open, and what it reads is the word that \
                  the model says next: cup, pear, lamp, key. Step there with Alt and the arrow keys.",
        view: "What it remembers",
        kda: [2, 0],
        token: ":",
        in_answer: true,
    },
];
