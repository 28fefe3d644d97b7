//! Stop strings in a streamed answer: text that may become part of one is held back.

/// Searches the text of one answer for stop strings.
#[derive(Clone, Debug, Default)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, which may be the beginning of a stop string.
    held: String,
    /// Which stop came, by its index.
    found: Option<usize>,
    /// Whether the text ends after the stop, and not before it.
    included: bool,
}

impl StopStrings {
    pub(super) fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            ..Self::default()
        }
    }

    /// The same stops, with the one that comes as the end of the text.
    pub(super) fn included(mut self, included: bool) -> Self {
        self.included = included;
        self
    }

    /// The stop that came.
    pub(super) fn found(&self) -> Option<&str> {
        self.found.map(|stop| self.stops[stop].as_str())
    }

    /// Takes further text; returns what is certain, and whether a stop came: the text then ends before it, or after it where
    /// it is included.
    pub(super) fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let stops = self.stops.iter().enumerate();
        let found = stops
            .filter_map(|(stop, text)| Some((self.held.find(text.as_str())?, stop)))
            .min();
        if let Some((at, stop)) = found {
            self.found = Some(stop);
            let kept = if self.included {
                self.stops[stop].len()
            } else {
                0
            };
            self.held.truncate(at + kept);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |rest: &str| self.stops.iter().any(|stop| stop.starts_with(rest));
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| begins(&self.held[*at..]));
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Adds text in which no stop string is searched; what was held back before it is final.
    pub(super) fn pass(&mut self, text: &str) -> String {
        let mut certain = std::mem::take(&mut self.held);
        certain.push_str(text);
        certain
    }

    /// Ends the answer with its last text: what was held back is final, unless it completes a stop string.
    pub(super) fn finish(&mut self, last: &str) -> String {
        let (text, _) = self.push(last);
        text + &std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds::properties;
    use proptest::prelude::*;

    #[test]
    fn a_stop_across_pieces_is_never_shown() {
        let mut text = StopStrings::new(&["END".to_owned(), "\n\n".to_owned()]);
        assert_eq!(text.push("a E"), ("a ".to_owned(), false));
        assert_eq!(text.push("N"), (String::new(), false));
        assert_eq!(text.push("X\n"), ("ENX".to_owned(), false));
        assert_eq!(text.push("b EN"), ("\nb ".to_owned(), false));
        assert_eq!(text.push("Dc"), (String::new(), true));
    }

    #[test]
    fn no_stop_is_found_in_or_across_what_passes() {
        let mut text = StopStrings::new(&["END".to_owned()]);
        assert_eq!(text.push("a EN"), ("a ".to_owned(), false));
        assert_eq!(text.pass("D END"), "END END");
        assert_eq!(text.push("END"), (String::new(), true));
    }

    #[test]
    fn the_stop_that_came_is_told_and_kept_where_that_is_wanted() {
        let stops = ["END".to_owned(), "\n\n".to_owned()];
        let mut text = StopStrings::new(&stops);
        assert_eq!(text.found(), None);
        assert_eq!(text.push("a\n\nEND"), ("a".to_owned(), true));
        assert_eq!(text.found(), Some("\n\n"));
        let mut text = StopStrings::new(&stops).included(true);
        assert_eq!(text.push("a E"), ("a ".to_owned(), false));
        assert_eq!(text.push("ND b"), ("END".to_owned(), true));
        assert_eq!(text.found(), Some("END"));
    }

    #[test]
    fn what_was_no_stop_comes_at_the_end() {
        let mut text = StopStrings::new(&["END".to_owned()]);
        assert_eq!(text.push("EN"), (String::new(), false));
        assert_eq!(text.finish(""), "EN");
    }

    properties! { stops, 256,
        #[test]
        fn cut_anywhere_the_text_is_the_same(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 1..3),
        ) {
            let whole = pieces.concat();
            let (mut stream, mut shown, mut stopped) = (StopStrings::new(&stops), String::new(), false);
            for piece in &pieces {
                let (text, stop) = stream.push(piece);
                shown.push_str(&text);
                stopped = stop;
                if stop {
                    break;
                }
            }
            if !stopped {
                shown.push_str(&stream.finish(""));
            }
            // The stop string that is completed first ends the text, where it begins.
            let ends = stops.iter().filter_map(|stop| whole.find(stop.as_str()).map(|at| (at + stop.len(), at)));
            match ends.min() {
                None => prop_assert_eq!(shown, whole),
                Some(_) => {
                    prop_assert!(stopped);
                    prop_assert!(whole.starts_with(&shown));
                    prop_assert!(stops.iter().any(|stop| whole[shown.len()..].starts_with(stop.as_str())));
                    prop_assert!(stops.iter().all(|stop| !shown.contains(stop.as_str())));
                }
            }
        }
    }
}
