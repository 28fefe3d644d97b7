//! Things to try with the demo model, each with what to look at.

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Example {
    /// Its name, on its button.
    pub name: &'static str,
    /// What is sent.
    pub prompt: &'static str,
    /// What to look at, and in which view.
    pub look_at: &'static str,
    /// The view that is brought to the front.
    pub view: &'static str,
}

/// The row of them. Their wording is that of the tasks which the demo model learnt.
pub const EXAMPLES: [Example; 4] = [
    Example {
        name: "Recall with overwriting",
        prompt: "The red box holds 7. The blue box holds 4. Now the red box holds 3. What does the red box hold?",
        look_at: "State: step to the token \"3\". The delta rule first reads what the memory holds for the red box (7), takes \
                  the error, and writes only the correction. The rank-1 change beside the state is that correction.",
        view: "State",
    },
    Example {
        name: "Tracking",
        prompt: "Mary goes to the kitchen. Mary takes the apple. Mary goes to the garden. Mary drops the apple. Mary goes to the \
                 office. Where is the apple?",
        look_at: "Tokens, tinted by the error corrected: it is large where the world changes (goes, takes, drops) and small \
                  elsewhere. Layers and heads shows which heads carry it.",
        view: "Tokens",
    },
    Example {
        name: "Stack",
        prompt: "Push key. Push lamp. Push cup. Pop. What is on top?",
        look_at: "Half-lives: a stack must survive many tokens, so the heads that carry it decay slowly. Select a head in Layers \
                  and heads, and compare the histogram's right edge.",
        view: "Half-lives",
    },
    Example {
        name: "Reverse",
        prompt: "Reverse: 4, 8, 2, 6.",
        look_at: "What it attends to: while the answer is written, the attention layer's weight steps backwards through the list, \
                  one item a token; the KDA head's implicit attention shows what its memory still answers.",
        view: "What it attends to",
    },
];
