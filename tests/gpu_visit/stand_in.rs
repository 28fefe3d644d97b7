//! The program as a visit meets it where something is wrong: one case kills its process, one never ends, one operation computes
//! something else. This executable takes its place; all else it hands to the program itself.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::conformance::report::CaseResult;
use kimi_linear::conformance::{Case, Options, Verdict, cases, run};

use crate::bugs::{BUGS, Bug};
use crate::planted::Mutated;
use crate::wrapped::Wrapped;

/// The case whose process dies.
pub(crate) const CRASH: &str = "kda_recurrence/cut/wild/T=200";
/// The case that never ends.
pub(crate) const HANG: &str = "select/not finite/infinity";
/// The operation that computes something else.
pub(crate) const WRONG: &str = "swiglu";

/// Set where this executable is to stand in; the program itself.
pub(crate) const PROGRAM: &str = "KIMI_VISIT_PROGRAM";

/// What the program would do with these arguments, but for what is planted.
pub(crate) fn stand_in(program: OsString, arguments: Vec<String>) -> ExitCode {
    if let Some(filter) = planted(&arguments) {
        return conformance(filter);
    }
    let error = Command::new(program).args(arguments).exec();
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// The filter of a run on the CPU over cases of an operation in which something is planted.
fn planted(arguments: &[String]) -> Option<&str> {
    let [command, rest @ ..] = arguments else {
        return None;
    };
    let after = |option: &str| {
        let at = rest.iter().position(|argument| argument == option)?;
        rest.get(at + 1).map(String::as_str)
    };
    let filter = after("--filter").filter(|filter| {
        [CRASH, HANG, WRONG]
            .iter()
            .any(|name| operation(name) == operation(filter))
    })?;
    (command == "conformance" && after("--backend") == Some("cpu")).then_some(filter)
}

fn operation(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}

/// `conformance --filter FILTER`, a line a case.
fn conformance(filter: &str) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for case in cases().iter().filter(|case| case.name.contains(filter)) {
        match case.name.as_str() {
            CRASH => std::process::abort(),
            HANG => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => {}
        }
        let result = result(case);
        if matches!(result.outcome.verdict, Verdict::Failed | Verdict::Lost) {
            code = ExitCode::FAILURE;
        }
        println!("{}", result.line());
    }
    code
}

fn result(case: &Case) -> CaseResult {
    let start = Instant::now();
    let bug = BUGS
        .iter()
        .find(|(_, operations)| case.operation == WRONG && operations.contains(&case.operation));
    let bug = bug.map_or(Bug::None, |(bug, _)| *bug);
    let mut backend: Box<dyn Backend> =
        Box::new(Wrapped::new(Box::new(CpuBackend::new()), Mutated::new(bug)));
    CaseResult {
        name: case.name.clone(),
        operation: case.operation,
        outcome: run(case, &mut *backend, Options::default()),
        seconds: start.elapsed().as_secs_f64(),
    }
}
