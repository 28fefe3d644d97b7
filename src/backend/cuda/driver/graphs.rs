//! Lists of commands that ran before in a step, and CUDA graphs of them.
//!
//! Commands run one by one the first time and as a graph from the second time on. A list that cannot be captured always runs
//! one by one: a graph saves time and changes no result. This file does not call the driver; [`Runner`] does.

use std::collections::HashMap;

use crate::backend::Result;
use crate::backend::cuda::machine::Command;
use crate::error::BackendError;

/// Maximum number of lists of commands and graphs that are remembered per step.
const REMEMBERED: usize = 8;

/// Runs commands.
pub(super) trait Runner {
    /// A graph that can be launched.
    type Graph;

    /// Runs commands one by one.
    fn commands(&mut self, commands: &[Command]) -> Result<()>;

    /// Creates a graph of commands that ran before. None of them runs.
    fn capture(&mut self, commands: &[Command]) -> Result<Self::Graph>;

    /// Runs a graph.
    fn launch(&mut self, graph: &Self::Graph) -> Result<()>;
}

/// The state of a list of commands that ran before.
enum Form<G> {
    /// It ran once, one by one.
    Seen,
    /// A graph of it.
    Graph(G),
    /// It could not be captured.
    Refused,
}

struct Known<G> {
    commands: Vec<Command>,
    form: Form<G>,
}

/// The lists of every step.
pub(super) struct Graphs<G> {
    enabled: bool,
    steps: HashMap<u64, Vec<Known<G>>>,
}

impl<G> Graphs<G> {
    /// No list so far. If graphs are not `enabled`, commands always run one by one.
    pub(super) fn new(enabled: bool) -> Self {
        Self {
            enabled,
            steps: HashMap::new(),
        }
    }

    /// Drops the graphs of a step.
    pub(super) fn forget(&mut self, step: u64) {
        self.steps.remove(&step);
    }

    /// Drops the graphs of all steps.
    pub(super) fn forget_all(&mut self) {
        self.steps.clear();
    }

    /// Runs commands of a step: as a graph, if the same commands ran before in it.
    ///
    /// # Errors
    /// Those of running the commands. A capture that fails is logged, unless the device was lost.
    pub(super) fn run<R: Runner<Graph = G>>(
        &mut self,
        step: u64,
        commands: &[Command],
        runner: &mut R,
    ) -> Result<()> {
        if !self.enabled {
            return runner.commands(commands);
        }
        let known = self.steps.entry(step).or_default();
        let at = known.iter().position(|known| known.commands == commands);
        let Some(at) = at else {
            runner.commands(commands)?;
            if known.len() >= REMEMBERED {
                known.remove(0);
            }
            known.push(Known {
                commands: commands.to_vec(),
                form: Form::Seen,
            });
            return Ok(());
        };
        // The most recently used one is dropped last.
        known[at..].rotate_left(1);
        let Some(found) = known.last_mut() else {
            return Ok(());
        };
        if matches!(found.form, Form::Seen) {
            found.form = match runner.capture(commands) {
                Ok(graph) => Form::Graph(graph),
                Err(error @ BackendError::Lost { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(
                        "{error}: {} commands run one by one, not as a CUDA graph; KIMI_LINEAR_GRAPHS=0 turns graphs off",
                        commands.len()
                    );
                    Form::Refused
                }
            };
        }
        match &found.form {
            Form::Graph(graph) => runner.launch(graph),
            Form::Seen | Form::Refused => runner.commands(commands),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::cuda::machine::{Buffer, Memory, Place};

    /// Memory that is never read.
    struct Nowhere;

    impl Memory for Nowhere {}

    /// Lists that differ in the number of bytes that they copy.
    fn list(number: u64) -> Vec<Command> {
        thread_local! {
            static ENDS: [Arc<Buffer>; 2] =
                [(); 2].map(|()| Arc::new(Buffer::of(Box::new(Nowhere), 4096)));
        }
        let [from, to] = ENDS.with(|ends| ends.each_ref().map(|end| Place::new(end, 0, number)));
        vec![Command::Copy {
            from: from.unwrap(),
            to: to.unwrap(),
        }]
    }

    fn refusal() -> BackendError {
        BackendError::Driver {
            backend: "cuda",
            what: "a capture".to_owned(),
            reason: "operation not permitted when stream is capturing".to_owned(),
        }
    }

    fn lost() -> BackendError {
        BackendError::Lost {
            backend: "cuda",
            reason: "a capture: an illegal memory access was encountered".to_owned(),
        }
    }

    /// Records the calls, and fails the captures that a test selects.
    #[derive(Default)]
    struct Script {
        calls: Vec<String>,
        refuses: Option<BackendError>,
    }

    impl Runner for Script {
        type Graph = usize;

        fn commands(&mut self, commands: &[Command]) -> Result<()> {
            self.calls.push(format!("run {}", commands.len()));
            Ok(())
        }

        fn capture(&mut self, commands: &[Command]) -> Result<usize> {
            self.calls.push(format!("capture {}", commands.len()));
            self.refuses.clone().map_or(Ok(commands.len()), Err)
        }

        fn launch(&mut self, graph: &usize) -> Result<()> {
            self.calls.push(format!("launch {graph}"));
            Ok(())
        }
    }

    impl Script {
        fn taken(&mut self) -> Vec<String> {
            std::mem::take(&mut self.calls)
        }
    }

    #[test]
    fn the_second_time_is_captured_and_every_later_one_launched() {
        let (mut graphs, mut script) = (Graphs::new(true), Script::default());
        for _ in 0..3 {
            graphs.run(1, &list(1), &mut script).unwrap();
        }
        assert_eq!(
            script.taken(),
            ["run 1", "capture 1", "launch 1", "launch 1"]
        );
        // Lists of another step are separate, and `forget` drops those of this one.
        graphs.run(2, &list(1), &mut script).unwrap();
        graphs.forget(1);
        graphs.run(1, &list(1), &mut script).unwrap();
        assert_eq!(script.taken(), ["run 1", "run 1"]);
    }

    #[test]
    fn a_capture_that_fails_is_tried_once_and_its_commands_run_for_good() {
        let mut script = Script {
            refuses: Some(refusal()),
            ..Script::default()
        };
        let mut graphs = Graphs::new(true);
        for _ in 0..4 {
            graphs.run(1, &list(1), &mut script).unwrap();
        }
        assert_eq!(
            script.taken(),
            ["run 1", "capture 1", "run 1", "run 1", "run 1"]
        );
        // Other commands of the step still become a graph.
        script.refuses = None;
        for _ in 0..2 {
            graphs.run(1, &list(2), &mut script).unwrap();
        }
        assert_eq!(script.taken(), ["run 1", "capture 1", "launch 1"]);
    }

    #[test]
    fn a_device_that_is_lost_while_capturing_is_an_error() {
        let mut script = Script {
            refuses: Some(lost()),
            ..Script::default()
        };
        let mut graphs = Graphs::new(true);
        graphs.run(1, &list(1), &mut script).unwrap();
        assert_eq!(graphs.run(1, &list(1), &mut script), Err(lost()));
    }

    #[test]
    fn graphs_can_be_turned_off() {
        let (mut graphs, mut script) = (Graphs::new(false), Script::default());
        for _ in 0..3 {
            graphs.run(1, &list(1), &mut script).unwrap();
        }
        assert_eq!(script.taken(), ["run 1", "run 1", "run 1"]);
    }

    #[test]
    fn what_was_used_last_is_kept() {
        let (mut graphs, mut script) = (Graphs::new(true), Script::default());
        for number in 0..REMEMBERED as u64 {
            graphs.run(1, &list(number), &mut script).unwrap();
        }
        graphs.run(1, &list(0), &mut script).unwrap();
        // One more than is remembered: the least recently used is dropped, which is no longer the first.
        graphs.run(1, &list(99), &mut script).unwrap();
        script.taken();
        graphs.run(1, &list(0), &mut script).unwrap();
        graphs.run(1, &list(1), &mut script).unwrap();
        assert_eq!(script.taken(), ["launch 1", "run 1"]);
    }
}
