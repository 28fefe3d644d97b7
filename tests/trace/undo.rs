//! Undone writes on every backend: the slot holds the decayed state, and the frame shows it.

use kimi_linear::engine::{Request, UndoWrite};
use kimi_linear::model::TraceHead;

use crate::engine_harness::{request, tokens};
use crate::frames::{choice, frames};
use crate::{BOUND, WHOLE};

#[test]
fn the_next_token_reads_the_state_without_the_write() {
    const TOKEN: usize = 5;
    for (name, backend) in WHOLE {
        let traced = Request {
            trace: Some(choice((4, 1), (3, 0))),
            trace_from: Some(0),
            undo: vec![UndoWrite {
                token: TOKEN,
                head: Some(TraceHead { layer: 4, head: 1 }),
            }],
            ..request(tokens(4, 9), 2)
        };
        let frames = frames(*backend, "tiny-a", traced);
        let states = [TOKEN - 1, TOKEN].map(|at| frames[at].state.as_ref().unwrap());
        let [before, after] = states;
        assert!(after.undone && !before.undone, "{name}");
        for (i, found) in after.state.iter().enumerate() {
            let expected = after.decay[i / after.width] * before.state[i];
            let apart = f64::from((found - expected).abs());
            assert!(apart < BOUND, "{name}: S[{i}] {found} against {expected}");
        }
        // The token itself did write: its numbers are those of its step.
        let layer = frames[TOKEN].kda.iter().find(|kda| kda.layer == 4).unwrap();
        assert!(layer.heads[1].write > 0.0, "{name}");
        let next = frames[TOKEN + 1].state.as_ref().unwrap();
        crate::frames::check_recurrence(after, next);
    }
}
