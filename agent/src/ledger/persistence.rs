//! Which differences stay, and what is told of them. Functions of plain values: the clock is the
//! caller's.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::RawFd,
    time::{Duration, Instant},
};

use super::{Difference, DifferenceKind};

/// A difference that stays for so long is none of traffic's.
const PERSISTENT: Duration = Duration::from_secs(10);

/// How much earlier it is suspected: longer than a look takes.
const MARGIN: Duration = Duration::from_secs(1);

/// Since when each difference has been there, at each look.
#[derive(Debug, Default)]
pub struct Persistence(HashMap<Key, Instant>);

type Key = (DifferenceKind, RawFd, String);

impl Persistence {
    /// Takes in the differences of a look, and gives those that are there for long.
    pub fn update(&mut self, differences: Vec<Difference>, now: Instant) -> Vec<Difference> {
        let mut before = std::mem::take(&mut self.0);
        let mut stay = Vec::new();
        for difference in differences {
            let key = key(&difference);
            let since = before.remove(&key).unwrap_or(now);
            self.0.insert(key, since);
            if now - since >= PERSISTENT {
                stay.push(difference);
            }
        }
        stay
    }

    /// How long a difference has been there at each look.
    pub fn age(&self, difference: &Difference, now: Instant) -> Duration {
        let since = self.0.get(&key(difference));
        since.map_or(Duration::ZERO, |since| now - *since)
    }

    /// Whether something has been there for nearly as long as a difference that stays.
    pub fn has_suspects(&self, now: Instant) -> bool {
        let nearly = PERSISTENT.saturating_sub(MARGIN);
        self.0.values().any(|since| now - *since >= nearly)
    }
}

fn key(difference: &Difference) -> Key {
    let identity = difference.identity.clone();
    (difference.kind, difference.descriptor, identity)
}

/// What is told in one line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub kind: DifferenceKind,
    pub what: String,
    pub pod: Option<u32>,
}

/// Something to tell.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Differences of this group stay: how many, and one of them.
    Begins(Group, usize, Difference),
    /// None of this group is left.
    Ends(Group),
}

/// What was told and hasn't ended, with how many there were.
#[derive(Debug, Default)]
pub struct Alarms(BTreeMap<Group, usize>);

impl Alarms {
    /// Takes in the differences that stay now. Each group is told of when it begins, whenever it has
    /// doubled, and when it ends.
    pub fn update(&mut self, stay: &[Difference]) -> Vec<Event> {
        let mut now: BTreeMap<Group, (usize, &Difference)> = BTreeMap::new();
        for difference in stay {
            let group = Group {
                kind: difference.kind,
                what: difference.what.clone(),
                pod: difference.pod,
            };
            now.entry(group).or_insert((0, difference)).0 += 1;
        }
        let mut events = Vec::new();
        self.0.retain(|group, _| {
            let stays = now.contains_key(group);
            if !stays {
                events.push(Event::Ends(group.clone()));
            }
            stays
        });
        for (group, (count, example)) in now {
            let told = self.0.entry(group.clone()).or_insert(0);
            if count >= (*told * 2).max(1) {
                *told = count;
                events.push(Event::Begins(group, count, example.clone()));
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(descriptor: RawFd, inode: u64) -> Difference {
        Difference {
            kind: DifferenceKind::Unaccounted,
            what: "connection".to_owned(),
            pod: Some(1),
            descriptor,
            identity: format!("socket:[{inode}]"),
            inode: None,
            ends: None,
        }
    }

    #[test]
    fn what_comes_and_goes_is_never_told_and_what_stays_is() {
        let (start, mut persistence) = (Instant::now(), Persistence::default());
        for second in 0..30 {
            let now = start + Duration::from_secs(second);
            // The same descriptor again and again, of another socket each time.
            let stay = persistence.update(vec![socket(5, second), socket(6, 1)], now);
            let leaked = (second >= 10).then_some(6);
            assert_eq!(stay.first().map(|d| d.descriptor), leaked, "{second}");
            assert!(stay.len() <= 1);
        }
    }

    #[test]
    fn what_has_just_come_is_no_suspect() {
        let (start, mut persistence) = (Instant::now(), Persistence::default());
        persistence.update(vec![socket(5, 1)], start);
        assert!(!persistence.has_suspects(start + Duration::from_secs(8)));
        assert!(persistence.has_suspects(start + Duration::from_secs(9)));
    }

    #[test]
    fn what_was_gone_in_between_begins_anew() {
        let (start, mut persistence) = (Instant::now(), Persistence::default());
        let mut look = |second, found| {
            let now = start + Duration::from_secs(second);
            persistence.update(found, now).len()
        };
        assert_eq!(look(0, vec![socket(5, 1)]), 0);
        assert_eq!(look(6, Vec::new()), 0);
        assert_eq!(look(8, vec![socket(5, 1)]), 0);
        assert_eq!(look(17, vec![socket(5, 1)]), 0);
        assert_eq!(look(18, vec![socket(5, 1)]), 1);
    }

    #[test]
    fn a_group_is_told_of_when_it_begins_when_it_doubles_and_when_it_ends() {
        let mut alarms = Alarms::default();
        let mut told = |sockets: RawFd| {
            let stay: Vec<_> = (0..sockets).map(|n| socket(n, 1)).collect();
            let events = alarms.update(&stay);
            let text = |event: &Event| match event {
                Event::Begins(_, count, _) => format!("{count}"),
                Event::Ends(_) => "over".to_owned(),
            };
            events.iter().map(text).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(told(0), "");
        assert_eq!(told(2), "2");
        assert_eq!(told(3), "");
        assert_eq!(told(4), "4");
        assert_eq!(told(0), "over");
        assert_eq!(told(0), "");
        assert_eq!(told(1), "1");
    }
}
