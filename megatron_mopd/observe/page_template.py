"""The template of the report page: markup and style in one string, rendered by jinja2. It loads nothing from
a network."""

# ruff: noqa: E501  (markup)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} – report</title>
<style>
:root { {% for name, (light, dark) in theme.items() %}--{{ name }}: {{ light }}; {% endfor %}}
@media (prefers-color-scheme: dark) { :root { {% for name, (light, dark) in theme.items() %}--{{ name }}: {{ dark }}; {% endfor %}} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 1220px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 26px; }
h1 { font-size: 25px; margin: 0; } h2 { font-size: 18px; margin: 0 0 4px; } h3 { font-size: 14px; margin: 12px 0 2px; }
p { margin: 4px 0 10px; } .muted, .note { color: var(--muted); } .note { font-size: 13px; }
nav { margin: 10px 0 16px; display: flex; flex-wrap: wrap; } nav a { color: var(--main); margin-right: 16px; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin-bottom: 16px; overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px 14px; flex: 1 1 130px; }
.tile b { display: block; font-size: 20px; white-space: nowrap; } .tile span { color: var(--muted); font-size: 13px; }
.charts { display: flex; flex-wrap: wrap; gap: 8px 14px; } .charts > div { flex: 0 1 560px; }
svg { max-width: 100%; height: auto; display: block; } td svg { min-width: 110px; }
.wide { overflow-x: auto; } .wide svg { min-width: min(var(--drawn), 760px); }
svg path { stroke-linejoin: round; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; margin-right: 14px; font-size: 12.5px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
.sample { border-top: 1px solid var(--line); padding: 10px 0; }
.sample .prompt { color: var(--muted); white-space: pre-wrap; overflow-wrap: anywhere; }
.sample .tokens { font: 14px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { padding: 2px 0; border-radius: 3px; } .tokens span:hover { outline: 1px solid var(--muted); }
.tokens em { color: var(--muted); font-size: 12px; }
.alarm { border-left: 4px solid var(--warm); padding: 3px 10px; margin: 6px 0; }
pre { font-size: 12.5px; overflow-x: auto; background: var(--back); padding: 12px; border-radius: 8px; }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12.5px; }
summary { cursor: pointer; color: var(--main); } footer { padding-bottom: 30px; }
</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<p class="muted">{{ status }}</p>
<nav>{% for part in parts %}<a href="#{{ part.anchor }}">{{ part.title }}</a>{% endfor %}</nav>
</header>
<main>
<div class="tiles">{% for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span></div>{% endfor %}
</div>
{% for part in parts %}
<section id="{{ part.anchor }}">
<h2>{{ part.title }}</h2>
{% if part.note %}<p class="note">{{ part.note }}</p>{% endif %}
{% if part.legend %}<p>{% for key in part.legend %}<span class="key"><i style="background:{{ key[1] }}"></i>{{ key[0] }}</span>{% endfor %}</p>{% endif %}
{% for title, svg in part.wide %}{% if title %}<h3>{{ title }}</h3>{% endif %}<div class="wide">{{ svg | safe }}</div>{% endfor %}
{% if part.charts %}<div class="charts">{% for title, svg in part.charts %}
<div><h3>{{ title }}</h3>{{ svg | safe }}</div>{% endfor %}</div>{% endif %}
{% if part.table %}<table><thead><tr>{% for cell in part.table.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.table.rows %}
<tr>{% for cell in row %}{% if cell.svg is defined %}<td>{{ cell.svg | safe }}</td>{% elif cell.mono is defined %}<td class="mono">{{ cell.mono }}</td>{% else %}<td{{ ' class="n"' | safe if cell.right }}>{{ cell.text }}</td>{% endif %}{% endfor %}</tr>{% endfor %}
</tbody></table>{% endif %}
{% for group in part.samples %}{% if group.folded %}<details><summary>{{ group.title }}</summary>{% else %}<h3>{{ group.title }}</h3>{% endif %}
{% for sample in group.entries %}<div class="sample">
<b>{{ sample.domain }}</b> <span class="muted">{{ sample.facts }}</span>
<div class="prompt">{{ sample.prompt }}</div>
<div class="tokens">{% for token in sample.tokens %}<span style="background:rgba(var(--heat),{{ token.strength }})" title="{{ token.hint }}">{{ token.text }}</span>{% endfor %}{% if sample.ending %} <em>{{ sample.ending }}</em>{% endif %}</div>
</div>{% endfor %}{% if group.folded %}</details>{% endif %}{% endfor %}
{% for alarm in part.alarms %}<p class="alarm"><b>{{ alarm.when }}</b> {{ alarm.message }}</p>{% endfor %}
{% for title, text in part.texts %}<details{{ " open" if part.opened }}><summary>{{ title }}</summary><pre>{{ text }}</pre></details>{% endfor %}
{% if part.lines %}<ul>{% for line in part.lines %}<li class="note">{{ line }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endfor %}
</main>
<footer class="muted">Written {{ written }} by megatron_mopd {{ version }} from {{ directory }}</footer>
</body>
</html>
"""
