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
    /// A KDA layer and head of the demo model that shows it, if one was found.
    pub kda: Option<[usize; 2]>,
}

/// All examples, in the order of their buttons.
pub const EXAMPLES: [Example; 4] = [
    Example {
        name: SUGGESTIONS[0].0,
        prompt: SUGGESTIONS[0].1,
        look_at: "State: step to the token \"3\". This head writes where a number comes and hardly elsewhere. It first reads what \
                  it holds under the red box (r, the 7), takes the error, and writes only the correction: the rank-1 change \
                  beside the state takes the 7 out and puts the 3 in.",
        view: "State",
        // Its writes at 7, 2 and 3: 9.6, 9.2 and 10.8; the median over the tokens up to there is 0.01.
        kda: Some([2, 0]),
    },
    Example {
        name: SUGGESTIONS[1].0,
        prompt: SUGGESTIONS[1].1,
        look_at: "Tokens, tinted by the error corrected: it is large where the world changes (goes, takes, drops) and small \
                  elsewhere. Layers and heads shows which heads carry it.",
        view: "Tokens",
        kda: None,
    },
    Example {
        name: SUGGESTIONS[2].0,
        prompt: SUGGESTIONS[2].1,
        look_at: "Half-lives: a stack must survive many tokens, so the heads that carry it decay slowly. Select a head in Layers \
                  and heads, and compare the histogram's right edge.",
        view: "Half-lives",
        kda: None,
    },
    Example {
        name: SUGGESTIONS[3].0,
        prompt: SUGGESTIONS[3].1,
        look_at: "What it attends to: while the answer is written, the attention layer's weight steps backwards through the list, \
                  one item a token; the KDA head's implicit attention shows what its memory still answers.",
        view: "What it attends to",
        kda: None,
    },
];
