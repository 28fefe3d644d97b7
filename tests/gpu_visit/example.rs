//! The example of `docs/gpu-visit.md`: the first part of a rehearsal's summary.

use std::path::Path;

const BEGIN: &str = "<!-- a rehearsal's summary -->\n";
const END: &str = "<!-- end of the summary -->";
/// Sections of the example; output of stand-in tools, tables and the machine are left out.
const SECTIONS: [&str; 4] = [
    "# Failed cases in other ways",
    "# Models",
    "# Headlines",
    "# Conformance",
];

/// Writes the example if requested, else compares the document with it, without seconds and errors, which differ between
/// runs.
pub(crate) fn held_to(summary: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/gpu-visit.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (held, after) = rest.split_once(END).unwrap();
    let example = format!("\n```text\n{}\n```\n\n", excerpt(summary));
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{example}{END}{after}")).unwrap();
        return;
    }
    let [found, expected] = [held, example.as_str()].map(steady);
    assert_eq!(
        found, expected,
        "the example in docs/gpu-visit.md is out of date: run this test with KIMI_BLESS=1\n{example}"
    );
}

fn excerpt(summary: &str) -> String {
    let mut parts: Vec<&str> = summary.trim_end().split("\n\n").collect();
    parts.retain(|part| {
        let title = part.lines().next().unwrap_or_default();
        SECTIONS.contains(&title) || !title.starts_with('#')
    });
    parts.join("\n\n")
}

/// The part that is the same in every run: headings, names, and the verdict without its numbers.
fn steady(text: &str) -> Vec<String> {
    let words = ["#", "DIED", "HANG", "FAIL", "VERDICT", "wrong besides"];
    let told = |line: &str| match line.split_once(": ") {
        Some(("VERDICT", verdict)) => verdict.replace(|c: char| c.is_ascii_digit(), ""),
        Some((name, _)) => name.to_owned(),
        None => line.to_owned(),
    };
    text.lines()
        .filter(|line| words.iter().any(|word| line.starts_with(word)))
        .map(told)
        .collect()
}
