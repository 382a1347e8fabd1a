// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/spf13/pflag"
)

const (
	helpWidth  = 100 // columns of a help text
	helpIndent = 32  // where the explanation of a flag begins
)

// WriteFlags writes the help of a set of flags, with their defaults, in the order of the set.
func WriteFlags(w io.Writer, fs *pflag.FlagSet) {
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name, usage := placeholder(f)
		head := "      --" + f.Name
		if f.Shorthand != "" {
			head = "  -" + f.Shorthand + ", --" + f.Name
		}
		if name != "" {
			head += " " + name
		}
		if _, wanted := f.Annotations[required]; wanted {
			usage += " (required)"
		} else if text := defaultOf(f); text != "" {
			usage += " (default " + text + ")"
		}
		if len(head) < helpIndent-1 {
			head += strings.Repeat(" ", helpIndent-len(head))
		} else {
			head += "\n" + strings.Repeat(" ", helpIndent)
		}
		fmt.Fprint(w, head)
		for i, line := range wrap(usage, helpWidth-helpIndent) {
			if i > 0 {
				fmt.Fprint(w, strings.Repeat(" ", helpIndent))
			}
			fmt.Fprintln(w, line)
		}
	})
}

// placeholder is what the help shows in the place of a flag's value, and its explanation.
func placeholder(f *pflag.Flag) (name, usage string) {
	name, usage = pflag.UnquoteUsage(f)
	switch name {
	case "int", "uint":
		name = "N"
	case "duration", "string":
		name = strings.ToUpper(name)
	}
	return name, usage
}

// defaultOf is the default in the words that the flag accepts; empty when nothing is the default.
func defaultOf(f *pflag.Flag) string {
	switch f.DefValue {
	case "", "false", "0", "0s", "[]":
		return ""
	}
	text := f.DefValue
	if f.Value.Type() == "duration" { // 8760h0m0s
		if strings.HasSuffix(text, "m0s") {
			text = strings.TrimSuffix(text, "0s")
		}
		if strings.HasSuffix(text, "h0m") {
			text = strings.TrimSuffix(text, "0m")
		}
	}
	return text
}

// WriteExamples writes the part of a help text that people read first.
func WriteExamples(w io.Writer, examples []Example) {
	if len(examples) == 0 {
		return
	}
	fmt.Fprint(w, "\nEXAMPLES\n")
	for i, e := range examples {
		if i > 0 {
			fmt.Fprintln(w)
		}
		for _, line := range wrap(e.What, helpWidth-4) {
			fmt.Fprintf(w, "  # %s\n", line)
		}
		for line := range strings.SplitSeq(e.Command, "\n") {
			fmt.Fprintf(w, "  %s\n", line)
		}
	}
}

// WriteParagraphs writes paragraphs, which an empty line separates.
func WriteParagraphs(w io.Writer, text string) {
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintln(w, strings.Join(wrap(paragraph, helpWidth), "\n"))
	}
}

// wrap breaks a text into lines of at most width characters, where its words allow it.
func wrap(text string, width int) []string {
	var lines []string
	line, length := "", 0
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case line == "":
			line, length = word, n
		case length+1+n > width:
			lines = append(lines, line)
			line, length = word, n
		default:
			line, length = line+" "+word, length+1+n
		}
	}
	return append(lines, line)
}
