//! Saves the demo model's state after a text to a file, and continues from it in another engine, which does not process the
//! text again:
//!
//! ```sh
//! cargo run --release --example memory
//! ```

use std::io::Write;

use kimi_linear::Llm;
use kimi_linear::cache::Snapshot;
use kimi_linear::llm::Generation;
use kimi_linear::tokenizer::Conversation;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("memory.kl");
    let greedy = Generation::default();

    let llm = Llm::demo()?;
    let mut conversation = Conversation::new(None);
    let fact = "The red box holds 7. The blue box holds 2.";
    let prompt = conversation.prompt(&llm.files().tokenizer, llm.files().template()?, fact)?;
    let told = llm.generate(prompt, &greedy)?;
    let read = told.prompt_tokens.len();
    let tokens = [told.prompt_tokens, told.tokens].concat();
    conversation.take(fact, &told.text, tokens.clone(), read);
    llm.snapshot(tokens)?.save(&file)?;
    drop(llm);

    let llm = Llm::demo()?;
    llm.restore(Snapshot::load(&file)?)?;
    let question = "What does the red box hold?";
    let prompt = conversation.prompt(&llm.files().tokenizer, llm.files().template()?, question)?;
    let answer = llm.generate(prompt, &greedy)?;
    writeln!(
        std::io::stdout(),
        "{} ({} of {} tokens came from the file)",
        answer.text,
        answer.usage.cached_tokens,
        answer.usage.prompt_tokens
    )?;
    Ok(())
}
