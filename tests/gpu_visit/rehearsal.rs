//! Both calls, run like `.ci/gpu-check rehearse`, and their expected output.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::example;
use crate::stand_in::{CRASH, HANG, PROGRAM, WRONG};

/// Maximum characters of a summary on stdout.
const PRINTED: usize = 11_000;
/// Maximum number of files of a visit.
const FILES: usize = 8;

/// Replaces Nsight Compute: runs the program, then prints one kernel in its CSV format. Replaces the sanitizer: runs the
/// program, then prints its last line, with a race in one operation. Nothing is measured.
const TOOLS: [(&str, &str); 2] = [
    (
        "ncu",
        r#"#!/bin/sh
while [ "$1" != "$KIMI_LINEAR" ]; do shift; done
"$@" || exit
cat <<CSV
==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","stand_in(float *)","dram__bytes.sum","byte","4,000"
"0","stand_in(float *)","gpu__time_duration.sum","ns","2,000"
CSV
"#,
    ),
    (
        "compute-sanitizer",
        r#"#!/bin/sh
tool=$2 found=0
while [ "$1" != "$KIMI_LINEAR" ]; do shift; done
"$@"
code=$?
case "$tool $*" in
racecheck*kda_chunk*) found=1 code=9 ;;
esac
case $tool in
racecheck) echo "========= RACECHECK SUMMARY: $found hazards displayed ($found errors, 0 warnings)" ;;
*) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
exit $code
"#,
    ),
];

/// A visit's folders: stand-ins for tools, files, state.
struct Visit(TempDir);

impl Visit {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in TOOLS {
            let path = folder.path().join("tools").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts a rehearsal of this program.
    fn start(&self, program: &Path) -> Child {
        let tools = std::env::var_os("PATH").unwrap_or_default();
        let tools = std::iter::once(self.path("tools")).chain(std::env::split_paths(&tools));
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/gpu-check"))
            .arg("rehearse")
            .arg(self.path("out"))
            .current_dir(self.0.path())
            .env("PATH", std::env::join_paths(tools).unwrap())
            .env("VISIT_WORK", self.path("work"))
            .env("KIMI_LINEAR", program)
            .env(PROGRAM, env!("CARGO_BIN_EXE_kimi-linear"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// The results of each case in the files.
    fn conformance(&self) -> BTreeMap<String, String> {
        let text = std::fs::read_to_string(self.path("out/conformance.txt")).unwrap();
        let cases = text.lines().map(|line| {
            let mut parts = line.split('\t');
            let [word, name] = [0; 2].map(|_| parts.next().unwrap().to_owned());
            (name, word)
        });
        cases.collect()
    }

    /// The last summary on stdout, after checks that apply to every visit's summary and files.
    fn summary(&self, output: &Output) -> String {
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = told.lines().last().unwrap_or_default();
        assert!(last.starts_with("VERDICT: "), "{told}\n{errors}");
        let whole = std::fs::read_to_string(self.path("out/summary.md")).unwrap();
        let printed = match told.rfind("(its beginning is in summary.md)\n") {
            Some(start) => &told[start..],
            None => whole.as_str(),
        };
        assert!(told.ends_with(printed), "{told}\n{whole}");
        assert!(printed.chars().count() <= PRINTED, "{printed}");
        let files: Vec<_> = std::fs::read_dir(self.path("out")).unwrap().collect();
        assert!(files.len() <= FILES, "{files:?}");
        for file in files {
            assert!(file.unwrap().metadata().unwrap().is_file());
        }
        whole
    }
}

fn this_executable() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// Whether a line of the summary begins and ends in this way.
fn has(summary: &str, begin: &str, end: &str) -> bool {
    summary
        .lines()
        .any(|line| line.starts_with(begin) && line.ends_with(end))
}

pub(crate) fn names_what_is_planted() {
    let visit = Visit::new();
    let output = visit.start(&this_executable()).wait_with_output().unwrap();
    let summary = visit.summary(&output);
    assert_eq!(output.status.code(), Some(1), "{summary}");

    let cases = visit.conformance();
    assert_eq!(cases.len(), kimi_linear::conformance::cases().len());
    let mut wrong = 0;
    for (name, word) in &cases {
        let expected = match name.as_str() {
            CRASH => &["DIED"][..],
            HANG => &["HANG"],
            // Comparisons of runs with each other pass nevertheless.
            name if name.starts_with(&format!("{WRONG}/")) => {
                wrong += usize::from(word == "FAIL");
                &["FAIL", "ok"]
            }
            _ => &["ok", "skip"],
        };
        assert!(
            expected.contains(&word.as_str()),
            "{word} {name}\n{summary}"
        );
    }
    assert!(wrong > 0, "{summary}");
    for (word, name) in [("DIED", CRASH), ("HANG", HANG), ("FAIL", WRONG)] {
        assert!(summary.contains(&format!("\n{word} {name}")), "{summary}");
    }
    let nothing = "wrong besides cases: nothing";
    assert!(summary.contains(nothing), "{summary}");

    // The second call repeated each in other ways, and all of them found the planted bug.
    for (word, name) in [("DIED", CRASH), ("HANG", HANG), ("FAIL", WRONG)] {
        let all = format!(": graphs-off {word}, early-off {word}, blocking {word}, PTX {word}");
        assert!(has(&summary, name, &all), "{summary}");
    }
    let doubtful = "doubtful where a kernel copies in bulk";
    assert!(
        has(&summary, "racecheck: kda_chunk/", doubtful),
        "{summary}"
    );
    assert!(has(
        &summary,
        "memcheck: linear/",
        "ERROR SUMMARY: 0 errors"
    ));
    assert!(
        has(&summary, "stand_in", " 1      2.00       2"),
        "{summary}"
    );
    if cfg!(feature = "wgpu") {
        assert!(has(&summary, "select/ ", "s") && has(&summary, "wgpu-decode-4k: ran", ""));
    }
    for model in ["score-tiny-a", "score-tiny-128", "generate", "eval"] {
        assert!(
            has(&summary, &format!("{model}, cpu | cpu: "), ""),
            "{summary}"
        );
    }
    if cfg!(all(feature = "cuda", feature = "server", feature = "wgpu")) {
        example::held_to(&summary);
    }
}

pub(crate) fn stopped_says_what_it_had() {
    let visit = Visit::new();
    let child = visit.start(&this_executable());
    // Some operations are done; the hanging one prevents the stage from ending.
    let done = visit.path("work/operations.list");
    let begin = Instant::now();
    while std::fs::read_to_string(&done).map_or(0, |text| text.lines().count()) < 3 {
        assert!(
            begin.elapsed() < Duration::from_secs(120),
            "no operation came to an end"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(told.success());
    let output = child.wait_with_output().unwrap();
    let summary = visit.summary(&output);
    assert_eq!(output.status.code(), Some(1), "{summary}");
    assert!(summary.contains("operations: stopped"), "{summary}");
    assert!(summary.contains("the visit: stopped"), "{summary}");
    let words: Vec<String> = visit.conformance().into_values().collect();
    assert!(words.contains(&"ok".to_owned()) && words.contains(&"never".to_owned()));
}

pub(crate) fn nothing_ran() {
    let visit = Visit::new();
    let output = visit
        .start(Path::new("/bin/false"))
        .wait_with_output()
        .unwrap();
    let summary = visit.summary(&output);
    assert_eq!(output.status.code(), Some(1), "{summary}");
    assert!(summary.contains("\nNOTHING RAN"), "{summary}");
    assert!(summary.contains("smoke: NVRTC: exit 1"), "{summary}");
}
