//! How rates, prompts and their changes are written on the command line.

use std::path::PathBuf;
use std::time::Duration;

use kimi_linear_plan::burst::Failure;
use kimi_linear_plan::lengths::LogNormal;
use kimi_linear_plan::replay::LinkChange;
use kimi_linear_plan::trace::Shape;

use super::super::options::parse_tokens;

/// Where prompts come from.
#[derive(Clone)]
pub(super) enum Requests {
    /// A distribution of uncached lengths.
    LogNormal(LogNormal),
    /// A trace's file.
    File(PathBuf),
}

impl Requests {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("lognormal:") {
            lognormal(text).map(Self::LogNormal)
        } else {
            Ok(Self::File(text.into()))
        }
    }
}

/// `lognormal:MU,SIGMA,LOW,HIGH`, the latter two in tokens.
pub(super) fn lognormal(text: &str) -> Result<LogNormal, String> {
    let wrong = || {
        format!(
            "`{text}`: expected lognormal:MU,SIGMA,LOW,HIGH, such as lognormal:9.90,1.00,128,128K"
        )
    };
    let numbers = text.strip_prefix("lognormal:").ok_or_else(wrong)?;
    let [mu, sigma, low, high] = numbers.split(',').collect::<Vec<_>>()[..] else {
        return Err(wrong());
    };
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| wrong());
    let tokens = |text: &str| u32::try_from(parse_tokens(text)?).map_err(|_| wrong());
    Ok(LogNormal {
        mu: number(mu)?,
        sigma: number(sigma)?,
        low: tokens(low)?,
        high: tokens(high)?,
    })
}

/// `TIME=INSTANCE`: when which instance fails.
pub(super) fn failure(text: &str) -> Result<Failure, String> {
    let wrong = || format!("`{text}`: expected TIME=INSTANCE, such as 10m=3");
    let (at, instance) = text.split_once('=').ok_or_else(wrong)?;
    Ok(Failure {
        at: time(at)?,
        instance: instance.parse().map_err(|_| wrong())?,
    })
}

/// Bits per second: `100G`, `250M`.
pub(super) fn bits(text: &str) -> Result<f64, String> {
    let units = [('K', 1e3), ('M', 1e6), ('G', 1e9), ('T', 1e12)];
    let unit = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(*unit)?, *factor)));
    unit.and_then(|(digits, factor)| Some(digits.parse::<f64>().ok()? * factor))
        .filter(|bits| bits.is_finite() && *bits > 0.0)
        .ok_or_else(|| format!("`{text}` is not a bandwidth in bit/s such as 100G or 250M"))
}

/// A rate per second, above 0.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|rate| rate.is_finite() && *rate > 0.0)
        .ok_or_else(|| format!("`{text}` is not a number above 0"))
}

/// A fraction, 0 to 1.
pub(super) fn part(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|part| (0.0..=1.0).contains(part))
        .ok_or_else(|| format!("`{text}` is not a fraction from 0 to 1"))
}

/// A time: `10s`, `5m`, `250ms`.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("`{text}` is not a time such as 250ms, 10s or 5m"))
}

/// `TIME=FRACTION`: from then on the link has that fraction of its bandwidth.
pub(super) fn link_change(text: &str) -> Result<LinkChange, String> {
    let (at, factor) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}`: expected TIME=FRACTION, such as 10m=0.2"))?;
    Ok(LinkChange {
        at: time(at)?,
        factor: part(factor)?,
    })
}

/// `steady`, `bursts:FACTOR,EVERY,DURATION` or `diurnal:AMPLITUDE,PERIOD`.
pub(super) fn shape(text: &str) -> Result<Shape, String> {
    let wrong = || {
        format!(
            "`{text}`: expected steady, bursts:FACTOR,EVERY,DURATION such as bursts:3,10m,1m, or diurnal:AMPLITUDE,PERIOD such as diurnal:0.5,24h"
        )
    };
    let (name, numbers) = text.split_once(':').unwrap_or((text, ""));
    let numbers: Vec<&str> = numbers.split(',').collect();
    match (name, &numbers[..]) {
        ("steady", [""]) => Ok(Shape::Steady),
        ("bursts", [factor, every, lasting]) => Ok(Shape::Bursts {
            factor: rate(factor)?,
            every: time(every)?,
            lasting: time(lasting)?,
        }),
        ("diurnal", [amplitude, period]) => Ok(Shape::Diurnal {
            amplitude: part(amplitude)?,
            period: time(period)?,
        }),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_understood_or_named() {
        assert_eq!(bits("100G"), Ok(100e9));
        assert_eq!(bits("2.5M"), Ok(2.5e6));
        for text in ["100", "G", "-1G", "0G", "1g"] {
            assert!(
                bits(text).is_err_and(|error| error.contains(text)),
                "{text}"
            );
        }
        assert!(matches!(
            Requests::parse("lognormal:9.9,1,128,128K"),
            Ok(Requests::LogNormal(LogNormal { high: 131_072, .. }))
        ));
        for text in ["lognormal:1,2,3", "lognormal:a,1,2,3", "lognormal:1,1,0,5"] {
            assert!(Requests::parse(text).is_err(), "{text}");
        }
        assert!(lognormal("lognormal:7.1,0.8,16,16K").is_ok());
        assert!(lognormal("trace.csv").is_err_and(|error| error.contains("trace.csv")));
        let failed = failure("10m=3").unwrap();
        assert_eq!((failed.at, failed.instance), (Duration::from_secs(600), 3));
        assert!(failure("10m").is_err() && failure("10m=x").is_err());
        let change = link_change("10m=0.2").unwrap();
        assert_eq!((change.at, change.factor), (Duration::from_secs(600), 0.2));
        assert!(link_change("10m").is_err() && link_change("x=1").is_err());
        assert_eq!(shape("steady"), Ok(Shape::Steady));
        assert!(shape("bursts:3,10m,1m").is_ok() && shape("diurnal:0.5,24h").is_ok());
        for text in ["steady:1", "bursts:3", "diurnal:2,1h", "waves"] {
            assert!(shape(text).is_err(), "{text}");
        }
    }
}
