//! The program with planted faults: one case kills its process, one never ends, one operation has wrong results. This
//! executable replaces the program and passes everything else on to it.

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

/// The case that kills its process.
pub(crate) const CRASH: &str = "kda_recurrence/cut/wild/T=200";
/// The case that never ends.
pub(crate) const HANG: &str = "select/not finite/infinity";
/// The operation with wrong results.
pub(crate) const WRONG: &str = "swiglu";

/// Set if this executable replaces the program; the path of the program.
pub(crate) const PROGRAM: &str = "KIMI_VISIT_PROGRAM";

/// The program's behaviour with these arguments, except for the planted faults.
pub(crate) fn stand_in(program: OsString, arguments: Vec<String>) -> ExitCode {
    if let Some(filter) = planted(&arguments) {
        return conformance(filter);
    }
    let error = Command::new(program).args(arguments).exec();
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// The filter of a run on the CPU over cases of an operation with a planted fault.
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

/// `conformance --filter FILTER`, one line per case.
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
