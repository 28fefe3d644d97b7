//! Trace files: Mooncake's JSON lines, Azure's and BurstGPT's CSV, distinguished by their first line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use time::PrimitiveDateTime;
use time::macros::{datetime, format_description};

use super::Trace;
use crate::{Error, Result};

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// The columns of a CSV trace that are read, with the names of Azure and BurstGPT.
struct Columns {
    at: usize,
    input: usize,
    output: usize,
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// A file that cannot be read, has no requests or another format; a line with missing fields or invalid numbers.
    pub fn read(path: &Path) -> Result<Self> {
        let unreadable = |source| Error::Read {
            path: path.into(),
            source,
        };
        let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
        let mut first = String::new();
        file.by_ref()
            .take(4096)
            .read_line(&mut first)
            .map_err(unreadable)?;
        file.rewind().map_err(unreadable)?;
        let mut trace = if first.trim_start().starts_with('{') {
            mooncake(path, file)?
        } else {
            csv(path, file)?
        };
        if trace.requests.is_empty() {
            return Err(Error::NoRequests);
        }
        trace.sort();
        Ok(trace)
    }
}

fn wrong(path: &Path, line: u64, what: impl Into<String>) -> Error {
    Error::Trace {
        path: path.into(),
        line,
        what: what.into(),
    }
}

fn mooncake(path: &Path, file: impl BufRead) -> Result<Trace> {
    let mut trace = Trace::new(Trace::MOONCAKE_BLOCK);
    for (number, line) in (1..).zip(file.lines()) {
        let line = line.map_err(|source| Error::Read {
            path: path.into(),
            source,
        })?;
        if line.trim().is_empty() {
            continue;
        }
        let parsed: MooncakeLine =
            serde_json::from_str(&line).map_err(|error| wrong(path, number, error.to_string()))?;
        let held = parsed.hash_ids.len() as u64 * u64::from(Trace::MOONCAKE_BLOCK);
        if !parsed.hash_ids.is_empty() && held < u64::from(parsed.input_length) {
            let what = format!(
                "{} ids of 512 tokens for a prompt of {}; a trace of another block size cannot be replayed",
                parsed.hash_ids.len(),
                parsed.input_length
            );
            return Err(wrong(path, number, what));
        }
        let at = seconds(path, number, parsed.timestamp / 1000.0)?;
        trace.push(
            at,
            parsed.input_length,
            parsed.output_length,
            &parsed.hash_ids,
        );
    }
    Ok(trace)
}

fn seconds(path: &Path, line: u64, seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| wrong(path, line, format!("{seconds} s is not a time of arrival")))
}

fn csv(path: &Path, file: impl Read) -> Result<Trace> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(file);
    let headers = reader
        .headers()
        .map_err(|error| wrong(path, 1, error.to_string()))?
        .clone();
    let find = |names: [&str; 2]| {
        headers.iter().position(|header| {
            names
                .iter()
                .any(|name| header.trim().eq_ignore_ascii_case(name))
        })
    };
    let columns = Columns {
        at: find(["TIMESTAMP", "Timestamp"]).unwrap_or(usize::MAX),
        input: find(["ContextTokens", "Request tokens"]).unwrap_or(usize::MAX),
        output: find(["GeneratedTokens", "Response tokens"]).unwrap_or(usize::MAX),
    };
    if [columns.at, columns.input, columns.output].contains(&usize::MAX) {
        return Err(wrong(
            path,
            1,
            "neither Mooncake's JSON lines (timestamp, input_length, output_length, hash_ids) nor CSV with the columns TIMESTAMP, \
             ContextTokens, GeneratedTokens (Azure) or Timestamp, Request tokens, Response tokens (BurstGPT)",
        ));
    }
    let mut trace = Trace::new(Trace::MOONCAKE_BLOCK);
    for record in reader.records() {
        let record = record.map_err(|error| {
            let line = error.position().map_or(0, csv::Position::line);
            wrong(path, line, error.to_string())
        })?;
        let line = record.position().map_or(0, csv::Position::line);
        let field = |column: usize| {
            record
                .get(column)
                .map(str::trim)
                .ok_or_else(|| wrong(path, line, "a field is missing"))
        };
        let count = |column: usize| {
            let text = field(column)?;
            text.parse::<u32>()
                .map_err(|_| wrong(path, line, format!("`{text}` is not a number of tokens")))
        };
        let at = time_of(path, line, field(columns.at)?)?;
        trace.push(at, count(columns.input)?, count(columns.output)?, &[]);
    }
    Ok(trace)
}

/// A time as in Azure's traces, or seconds as in BurstGPT's; from a start that all lines of the trace share.
fn time_of(path: &Path, line: u64, text: &str) -> Result<Duration> {
    if let Ok(number) = text.parse() {
        return seconds(path, line, number);
    }
    let format = format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second][optional [.[subsecond]]]"
    );
    PrimitiveDateTime::parse(text, &format)
        .ok()
        .and_then(|moment| Duration::try_from(moment - datetime!(1970-01-01 0:00)).ok())
        .ok_or_else(|| {
            let what =
                format!("`{text}` is neither seconds nor a time such as 2023-11-16 18:15:46.68");
            wrong(path, line, what)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str, text: &str) -> Self {
            let name = format!("kimi-linear-plan-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn read(name: &str, text: &str) -> Result<Trace> {
        let scratch = Scratch::new(name, text);
        Trace::read(&scratch.0)
    }

    #[test]
    fn mooncakes_lines_keep_their_prefixes() {
        let trace = read(
            "mooncake",
            "{\"timestamp\": 500, \"input_length\": 1500, \"output_length\": 7, \"hash_ids\": [1, 2, 3]}\n\n\
             {\"timestamp\": 1500, \"input_length\": 1536, \"output_length\": 9, \"hash_ids\": [1, 2, 4]}\n\
             {\"timestamp\": 1500, \"input_length\": 1024, \"output_length\": 0, \"hash_ids\": [1, 2]}\n",
        )
        .unwrap();
        let requests = trace.requests();
        assert_eq!(requests[0].at, Duration::ZERO);
        assert_eq!(requests[1].at, Duration::from_secs(1));
        assert_eq!(trace.blocks(&requests[1]), [1, 2, 4]);
        assert_eq!(requests[2].output, 1);
        // 1,500; 512 after two cached blocks; the last token of a prompt that is cached as a whole.
        assert_eq!(trace.uncached().unwrap().sorted(), [1, 512, 1500]);
    }

    #[test]
    fn azures_and_burstgpts_columns_are_found() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:46,5,6\n";
        let trace = read("azure", azure).unwrap();
        let first = trace.requests()[0];
        assert_eq!(
            (first.at, first.tokens, first.output),
            (Duration::ZERO, 374, 44)
        );
        assert!((trace.requests()[1].at.as_secs_f64() - 4.314579).abs() < 1e-6);
        assert_eq!(trace.output_tokens(), 53.0);
        let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n";
        let trace = read("burst", burst).unwrap();
        assert_eq!(trace.requests()[0].tokens, 472);
    }

    #[test]
    fn a_line_that_cannot_be_is_named() {
        let message = |name: &str, text: &str| read(name, text).unwrap_err().to_string();
        let short = message(
            "short",
            "{\"timestamp\": 0, \"input_length\": 9000, \"output_length\": 7, \"hash_ids\": [1]}\n",
        );
        assert!(
            short.contains("line 1: 1 ids of 512 tokens for a prompt of 9000"),
            "{short}"
        );
        let field = message("field", "{\"timestamp\": 0}\n");
        assert!(
            field.contains("line 1: missing field `input_length`"),
            "{field}"
        );
        let columns = message("columns", "a,b\n1,2\n");
        assert!(columns.contains("GeneratedTokens (Azure)"), "{columns}");
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        let number = message("number", &format!("{header}1,x,3\n"));
        assert!(
            number.contains("line 2: `x` is not a number of tokens"),
            "{number}"
        );
        let time = message("time", &format!("{header}yesterday,1,3\n"));
        assert!(time.contains("`yesterday` is neither seconds"), "{time}");
        assert!(message("empty", header).contains("no requests"));
        let absent = Trace::read(Path::new("no-such-trace")).unwrap_err();
        assert!(absent.to_string().starts_with("cannot read no-such-trace"));
    }
}
