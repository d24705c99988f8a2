"""How each vendor spells the symbols that people copy from other programs and sites.

    stocks            AAPL BRK.B BACpK    Polygon's; Yahoo's BRK-B and BAC-PK, $aapl, NASDAQ:AAPL, AAPL US Equity
    polygon_crypto    X:BTC-USD           of its flat files; X:BTCUSD of its REST, BTC-USD (Yahoo, Coinbase)
    binance_pairs     BTCUSDT             BTC/USDT (ccxt), BTC-USDT (OKX), BTC_USDT (Gate), XXBTZUSD (Kraken)
    binance_perpetuals  BTCUSDT.P         BTCUSDT at Binance, where the spot pair has that name, too

``advise_...`` knows names that are wrong whatever exists; ``other_...`` gives spellings to try for a name that is
well-formed and has no bars. Sources: the vendors' symbol pages, 2026-11; for stocks the CQS suffixes at
massive.com/knowledge-base and Yahoo's help page SLN2256.
"""

from __future__ import annotations

import re

# Longest first: BTCUSDT ends in USDT, not in T.
QUOTES = (
    "FDUSD", "USDT", "USDC", "BUSD", "TUSD", "USDP", "USDS", "USD1", "USDE", "EURI", "AEUR", "IDRT", "BIDR",
    "PERP", "USD", "EUR", "GBP", "TRY", "BRL", "JPY", "KRW", "AUD", "CAD", "CHF", "MXN", "ARS", "ZAR", "PLN",
    "UAH", "RUB", "INR", "DAI", "PAX", "UST", "BTC", "XBT", "ETH", "BNB",
)  # fmt: skip
DOLLARS = set("FDUSD USDT USDC BUSD TUSD USDP USDS USD1 USDE PERP USD DAI PAX UST".split())
CURRENCIES = set("EUR GBP TRY BRL JPY KRW AUD CAD CHF MXN ARS ZAR PLN UAH RUB INR".split())
CASH = DOLLARS | CURRENCIES
NOT_AT_BINANCE = {"USD", "UST", "PERP", "PAX", "USDP", "BUSD", "KRW", "CAD", "CHF", "INR"}
COINS = set(
    "BTC ETH BNB SOL XRP ADA DOGE TRX LINK AVAX DOT LTC BCH UNI AAVE ATOM NEAR FIL ETC ARB OP SHIB POL MATIC SUI "
    "ALGO XLM PEPE TON APT INJ HBAR ICP VET EOS XMR ZEC DASH XTZ MKR SNX CRV GRT SAND MANA FTM RUNE".split()
)
ALIASES = {
    "XBT": "BTC",
    "XXBT": "BTC",
    "XDG": "DOGE",
    "XXDG": "DOGE",
    "XETH": "ETH",
    "ZUSD": "USD",
    "ZEUR": "EUR",
}
KRAKEN = re.compile(r"X([A-Z]{3})Z([A-Z]{3})")

PAIR = re.compile(r"[A-Z0-9]{5,20}")  # Binance's
PERPETUAL = re.compile(r"[A-Z0-9]{5,20}\.P")  # ours, as charting sites write it
# Binance's perpetuals are on 1,000 of these coins.
THOUSANDS = set("SHIB PEPE FLOKI BONK SATS RATS LUNC XEC".split())
FLAT_FILE_PAIR = re.compile(r"X:[A-Z0-9]+-[A-Z0-9]+")  # Polygon's
# Up to five letters; then p, r, w: preferred shares, rights, when issued; .A, .WS, .U: class, warrants, units.
TICKER = re.compile(r"[A-Z0-9]{1,5}([prw][A-Z]*w?)?(\.(?!US$|OQ$|NYSE$|NASDAQ$|PR)[A-Z]{1,4}){0,2}")
EXCHANGE = re.compile(r"(NASDAQ|NYSE|AMEX|ARCA|BATS|OTC|US)[A-Z ]*:\s*", re.IGNORECASE)
TERMINAL = re.compile(r"(\s+U[SNWQAPVR](\s+EQUITY)?|\s+EQUITY|\.US|\.OQ|\.NYSE|\.NASDAQ)$", re.IGNORECASE)
PREFERRED = re.compile(r"([A-Z]{1,5})(?:[-/. ]P(?:R[-. ]?)?|\^)([A-Z])")
SHARE_CLASS = re.compile(r"([A-Z]{1,5})[-/ _.]([A-Z]{1,2})")


def advise_stock(name: str) -> str:
    """Return what is wrong with a name that no US stock has, and the right one; "" for one that may be."""
    if TICKER.fullmatch(name):
        return ""
    pair = _pair_of(name)
    if pair and pair[0] not in CASH and (pair[0] in COINS or pair[1] in DOLLARS):
        polygon, binance = _polygon_name(*pair), _binance_name(*pair)
        return f"is a coin: use {polygon} in polygon_crypto or {binance} in binance_pairs"
    better = _ticker_of(name)
    if better and better != name:
        return f"is spelled {better} here"
    return "is no US stock's ticker, such as AAPL, BRK.B or BACpK"


def advise_polygon_crypto(name: str) -> str:
    """Return what is wrong with a name that no pair of Polygon's flat files has; "" for one that may be."""
    if FLAT_FILE_PAIR.fullmatch(name):
        return ""
    pair = _pair_of(name)
    if pair and pair[0] in CURRENCIES | {"USD"} and pair[1] in CASH:
        return "is a currency, not a coin such as X:BTC-USD"
    if pair:
        return f"is spelled {_polygon_name(*pair)} in Polygon's flat files"
    return "is no pair of Polygon's flat files, such as X:BTC-USD"


def advise_binance_pair(name: str) -> str:
    """Return what is wrong with a name that no pair of Binance's has; "" for one that may be."""
    if PAIR.fullmatch(name):
        return ""
    pair = _pair_of(name)
    if pair and PERPETUAL.fullmatch(name):
        return f"is spelled {_binance_name(*pair)} at Binance; the perpetual {name} belongs in binance_perpetuals"
    if pair:
        return f"is spelled {_binance_name(*pair)} at Binance"
    return "is no Binance pair, such as BTCUSDT"


def advise_binance_perpetual(name: str) -> str:
    """Return what is wrong with a name that no USD-M perpetual has here; "" for one that may be."""
    pair = _pair_of(name)
    better = f"{_perpetual_name(*pair)}.P" if pair else ""
    if pair and pair[0] in THOUSANDS:
        return f"is {better} at Binance, a contract on 1,000 coins"
    if PERPETUAL.fullmatch(name):
        return ""
    if pair:
        return f"is spelled {better} here"
    return "is no perpetual of Binance's, such as BTCUSDT.P"


def is_stock(name: str) -> bool:
    """Guess from a name alone whether it is a stock: a ticker is one, a coin and a pair of currencies are none."""
    return name not in COINS and (bool(TICKER.fullmatch(name)) or _pair_of(name) is None)


def other_tickers(name: str) -> tuple[str, ...]:
    """Return other spellings of a well-formed ticker: BRKB -> BRK.B, AAPL.O -> AAPL."""
    if re.fullmatch(r"[A-Z]{2,4}[A-C]", name):
        return (f"{name[:-1]}.{name[-1]}",)
    if match := re.fullmatch(r"([A-Z]{1,5})\.[A-Z]{1,2}", name):
        return (match[1],)  # .O, .N, .K: Reuters' names of exchanges
    return ()


def other_polygon_pairs(name: str) -> tuple[str, ...]:
    """Return other spellings of a well-formed pair: X:BTC-USDT -> X:BTC-USD."""
    pair = _pair_of(name)
    better = _polygon_name(*pair) if pair else name
    return () if better == name else (better,)


def other_binance_pairs(name: str, suffix: str = "") -> tuple[str, ...]:
    """Return other spellings of a well-formed pair: BTCUSD -> BTCUSDT, BTCPERP -> BTCUSDT.

    Args:
        name: the pair, at Binance.
        suffix: of perpetuals, which may be on 1,000 coins.
    """
    pair = _pair_of(name)
    found = (_binance_name(*pair), pair[0] + "USDT") if pair else ()
    if pair and suffix:
        found = (*found, f"1000{pair[0]}USDT")
    return tuple(dict.fromkeys(better + suffix for better in found if better != name))


def at_yahoo(ticker: str) -> str:
    """Return Yahoo's spelling of a ticker: BRK.B is BRK-B there, where a dot names an exchange."""
    return (
        re.sub(r"^([A-Z]+)p([A-Z]*)", r"\1-P\2", ticker)
        .replace(".WS", ".WT")
        .replace(".U", ".UN")
        .replace(".", "-")
    )


def _polygon_name(base: str, quote: str) -> str:
    return f"X:{base}-{'USD' if quote in DOLLARS else quote}"


def _binance_name(base: str, quote: str) -> str:
    return base + ("USDT" if quote in NOT_AT_BINANCE else quote)


def _perpetual_name(base: str, quote: str) -> str:
    return ("1000" if base in THOUSANDS else "") + _binance_name(base, quote)


def _ticker_of(name: str) -> str:
    """Return a ticker in Polygon's spelling, "" if it cannot be one."""
    text = TERMINAL.sub("", EXCHANGE.sub("", name.strip().lstrip("$"), count=1)).strip()
    text = re.sub(r"^([A-Z]{1,5})([a-c])$", r"\1.\2", text).upper()  # BRKb of Reuters
    text = re.sub(r"^([A-Z]{1,5})(?:[-/ _.]W[ST]|\+)$", r"\1.WS", text)
    text = re.sub(r"^([A-Z]{1,5})[-/ _.]UN?$", r"\1.U", text)
    if match := PREFERRED.fullmatch(text):
        return f"{match[1]}p{match[2]}"
    if match := SHARE_CLASS.fullmatch(text):
        return f"{match[1]}.{match[2]}"
    return text if TICKER.fullmatch(text) else ""


def _pair_of(name: str) -> tuple[str, str] | None:
    """Return base and quote of a coin pair in any site's spelling, None if it is none; a coin alone is in USDT."""
    text = re.sub(r"^t(?=[A-Z0-9]{6,}$)", "", name.strip()).upper()  # Bitfinex
    # X: and C: of Polygon's REST, BINANCE: and KRAKEN: of charting sites.
    text = re.sub(r"^[A-Z]{1,12}:", "", text)
    text = re.sub(r":[A-Z]+$|[-_ ]?PERP$|\.P$|[-_]SWAP$|[-_ ]?SPOT$|=X$", "", text)
    if match := KRAKEN.fullmatch(text):
        text = "-".join(match.groups())
    parts = re.split(r"[-/_. ]+", text)
    if len(parts) == 1:
        if text in COINS or ALIASES.get(text) in COINS:
            parts = [text, "USDT"]
        else:
            splits = [[text.removesuffix(quote), quote] for quote in QUOTES if text.endswith(quote)]
            # XBT-USD, not XB-TUSD.
            splits.sort(key=lambda split: ALIASES.get(split[0], split[0]) not in COINS)
            if not splits or not splits[0][0]:
                return None
            parts = splits[0]
    if len(parts) != 2 or not all(re.fullmatch(r"[A-Z0-9]+", part) for part in parts):
        return None
    base, quote = (ALIASES.get(part, part) for part in parts)
    if base in CASH and quote not in CASH:  # USDT-BTC of Bittrex, KRW-BTC of Upbit
        base, quote = quote, base
    return (base, quote) if quote in QUOTES else None
