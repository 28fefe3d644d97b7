//! Asks the model in a folder or GGUF, or the demo model, one question, and streams the answer:
//!
//! ```sh
//! cargo run --release --example ask -- "The red box holds 7. What does the red box hold?"
//! cargo run --release --example ask -- "Hello" path/to/model
//! ```

use std::io::Write;

use kimi_linear::Llm;
use kimi_linear::llm::{Generation, Piece};
use kimi_linear::tokenizer::Chat;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let question = arguments
        .next()
        .ok_or("the first argument must be a question")?;
    let llm = match arguments.next() {
        Some(path) => Llm::open(path)?,
        None => Llm::demo()?,
    };
    let mut stdout = std::io::stdout();
    for piece in llm.stream(Chat::user(&question), &Generation::default())? {
        match piece? {
            Piece::Text { text, .. } => {
                write!(stdout, "{text}")?;
                stdout.flush()?;
            }
            Piece::End { text, usage, .. } => {
                writeln!(stdout, "{text}")?;
                writeln!(
                    std::io::stderr(),
                    "{} tokens after a prompt of {}",
                    usage.generated_tokens,
                    usage.prompt_tokens
                )?;
            }
        }
    }
    Ok(())
}
